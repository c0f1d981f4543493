"""The Go template renders what the student was trained on, or is refused by name; what ends an answer is in the Modelfile."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.text.templates import choose
from student_trainer.errors import ModelError
from student_trainer.export.ollama.go_text import GoTemplateError, quoted, render
from student_trainer.export.ollama.modelfile import make_modelfile, read_generation
from student_trainer.export.ollama.translation import translate
from tests.tiny import make_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are Q, created by \"C\".<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{{ s }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set p = messages[0].content + '\n\n' %}{% set ms = messages[1:] %}{% else %}{% set p = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ p if loop.first else '' }}{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GLM = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if m.role == 'user' %}[INST] {{ s if loop.first else '' }}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "gemma3": GEMMA3, "glm": GLM, "mistral": MISTRAL}
TALKS = [
    [("user", "hi")],
    [("system", "Be brief."), ("user", "hi\n\nthere")],
    [("user", "a"), ("assistant", "b {{ x }}"), ("user", "c"), ("assistant", 'd "e"'), ("user", "f")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "ü 你")],
]  # fmt: skip


def tokenizer_of(folder: Path, template: str):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder, chat_template=template))
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_known_families_are_translated(tmp_path, family, adds_bos):
    if adds_bos and "bos_token" not in FAMILIES[family]:
        pytest.skip("has none")
    tokenizer = tokenizer_of(tmp_path, FAMILIES[family])
    made = make_modelfile(tokenizer, {}, "model.gguf", adds_bos=adds_bos, context=64, name="x")
    template = choose("chat", tokenizer)
    source = made.text.partition('"""')[2].partition('"""')[0]
    for talk in TALKS:
        messages = [{"role": role, "content": text} for role, text in talk]
        if family == "gemma" and talk[0][0] == "system":
            with pytest.raises(GoTemplateError, match="index 0 of 0"):
                render(source, messages)
            continue
        expected, _ = template.prompt(Conversation(tuple(Turn(*turn) for turn in talk)))
        assert ("<|endoftext|>" if adds_bos else "") + render(source, messages) == expected
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    for wrong in (
        [{"role": "assistant", "content": "a"}],
        [*messages, {"role": "tool", "content": "x"}],
        [*messages, {"role": "system", "content": "x"}],
    ):
        with pytest.raises(GoTemplateError):
            render(source, wrong)
    notes = " ".join(made.translated.notes)
    assert ("trimmed" in notes) == ("trim" in FAMILIES[family]) and ("no system message" in notes) == (
        family == "gemma"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "stands 0 times"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content | replace('hello', 'bye') }}"),
            "on a conversation of .* renders .*bye",
        ),
        (
            CHATML.replace("{{ m.role }}\n", "{{ m.role }}{{ loop.index }}\n"),
            "on a conversation of|begins or ends otherwise",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.index == 7 %}!{% endif %}"),
            "on a conversation of",
        ),
    ],
)
def test_what_cannot_be_translated_is_named(tmp_path, template, words):
    tokenizer = tokenizer_of(tmp_path, template)
    with pytest.raises(ModelError, match=f"x: its chat template cannot be written as an Ollama TEMPLATE: .*{words}"):
        make_modelfile(tokenizer, {}, "model.gguf", adds_bos=False, context=None, name="x")


def test_an_engine_that_adds_a_bos_the_template_has_not(tmp_path):
    with pytest.raises(ModelError, match=r"llama.cpp puts '<\|endoftext\|>' in front"):
        make_modelfile(tokenizer_of(tmp_path, CHATML), {}, "model.gguf", adds_bos=True, context=None, name="x")


def test_thoughts_that_the_template_takes_out_are_told(tmp_path):
    qwen3 = CHATML.replace(
        "{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    )
    made = make_modelfile(tokenizer_of(tmp_path, qwen3), {}, "model.gguf", adds_bos=False, context=None, name="x")
    assert any("<think>" in note for note in made.translated.notes)
    empty = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    )
    tokenizer = tokenizer_of(tmp_path, empty)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    made = make_modelfile(tokenizer, {}, "model.gguf", adds_bos=False, context=None, name="x")
    assert made.stops == ("<|im_end|>",), (
        "Qwen3's template opens a last answer with an empty thought, which ends nothing"
    )


def test_stops_and_sampling(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML)
    tokenizer.eos_token = "<|endoftext|>"  # a base model's, while the template ends turns with another token
    generation = {
        "eos_token_id": [2, 0],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }
    lines = make_modelfile(tokenizer, generation, "m.gguf", adds_bos=False, context=4096, name="x").text.splitlines()
    assert lines[0] == "FROM ./m.gguf" and lines[1].startswith('TEMPLATE """')
    assert lines[2:] == [
        'PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0.7", "PARAMETER top_p 0.8", "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.05", "PARAMETER num_ctx 4096",
    ]  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert (
        "PARAMETER temperature 0\n"
        in make_modelfile(tokenizer, read_generation(tmp_path), "m", adds_bos=False, context=None, name="x").text
    )
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        make_modelfile(tokenizer, {}, "m.gguf", adds_bos=False, context=None, name="x")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a {{- \"b\" -}} c", "abc"),
        ("{{ if .System }}S{{ else if .Messages }}M{{ else }}N{{ end }}", "M"),
        ("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}", "[user:u][assistant:a][user:v\n\nw]"),
        ("{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ $m.Content }}{{ end }}{{ end }}", "v\n\nw"),
        ("{{ $x := 1 }}{{ range .Messages }}{{ if and (eq .Role \"user\") (ne $x 2) }}{{ $x = 2 }}{{ end }}{{ end }}{{ $x }}", "2"),
        ("{{/* nothing */}}{{ (index .Messages 0).Content }}", None),
        ("{{ if or .System (not .Messages) }}x{{ end }}{{ `raw }} text` }}", "raw }} text"),
        (quoted('{{ "x" }}\n\t\\ü'), '{{ "x" }}\n\t\\ü'),
    ],
)  # fmt: skip
def test_the_part_of_go(source, expected):
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "u"), ("assistant", "a"), ("user", "v"), ("user", "w"))
    ]
    if expected is None:
        with pytest.raises(GoTemplateError):
            render(source, messages)
    else:
        assert render(source, messages) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ if .System }}x",
        "{{ end }}",
        '{{ printf "%s" .System }}',
        "{{ .System | len }}",
        '{{ template "x" }}',
        "{{ $y = 1 }}",
        "{{ x",
    ],
)
def test_what_is_beyond_it_is_refused(source):
    with pytest.raises(GoTemplateError):
        render(source, [{"role": "user", "content": "u"}])


def test_a_translation_is_proved_and_not_believed(monkeypatch):
    from student_trainer.export.ollama import translation

    honest = translation._derive
    monkeypatch.setattr(
        translation, "_derive", lambda jinja: (honest(jinja)[0].replace("assistant", "asistant", 1), ())
    )
    with pytest.raises(ModelError, match="cannot be written"):
        translate(lambda messages: "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>", "x")


def test_a_template_that_prints_the_day_is_refused(tmp_path):
    """The day of the export would stand in every prompt from then on."""
    dated = "{% set day = strftime_now('%d %b %Y') %}Today: {{ day }}\n" + CHATML
    with pytest.raises(ModelError, match="prints the day"):
        make_modelfile(tokenizer_of(tmp_path, dated), {}, "model.gguf", adds_bos=False, context=None, name="dated")
