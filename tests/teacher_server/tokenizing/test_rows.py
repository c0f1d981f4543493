"""Rows of Tokenize with tiny tokenizers of the three kinds, against the tokenizer called directly and transformers' own rendering."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from teacher_server.backends.tokenizer import tokenizer_files
from teacher_server.tokenizing.rendering import render, written_end
from teacher_server.tokenizing.rows import RowReader
from teacher_wire.core.errors import CapabilityError
from teacher_wire.tokenizing.messages import TextRow
from teacher_wire.vocabulary.byte_table import BOS, CONTROL, END, TEXT, THINK_CLOSE, THINK_OPEN, UNUSED
from teacher_wire.vocabulary.tokenizer_file import byte_table
from tests.tiny import CHAT_TEMPLATE, WORDS

TEXTS = {
    "cjk": "你好，世界。漢字かな交じり文",
    "emoji": "🤖👩‍👩‍👧 and 🇩🇪",
    "crlf": "a\r\nb\r\n\r\n  c\r",
    "leading spaces": "   the cat",
    "one space": " the",
    "breaks": "\n\nthe\n",
    "digits": "1234567 and 3.14159, 007",
    "code": "def f(x):\n\treturn x ** 2  # é à ü\n",
    "controls": "\x00\x7f\xa0x",
    "words": "the old dog and the cat",
    "a control token of the teacher": "the <|im_end|> cat <s>",
    "a byte as it is written": "<0x41> is not A",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<unk>"]
CORPUS = [" ".join(WORDS) * 5, "user assistant system 1234 567 89 def return", "你好，世界。", "  a\n\n"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def sentencepiece(kind, dummy):
    """A SentencePiece-like tokenizer; `dummy` is how it puts a space before a text."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bpe":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *pieces], show_progress=False)
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=[*SPECIAL, *pieces], unk_token="<unk>", show_progress=False
        )
    if dummy == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif dummy == "none":
        made.normalizer = normalizers.Replace(" ", "▁")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=dummy, split=True)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts if dummy == "none" else [*parts, decoders.Strip(" ", 1, 0)])
    made.train_from_iterator(CORPUS, trainer)
    parsed = json.loads(made.to_str())
    parsed["added_tokens"] = [entry for entry in parsed["added_tokens"] if not entry["content"].startswith("<0x")]
    if kind == "unigram":
        parsed["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(parsed))


KINDS = {
    "byte level": byte_level,
    "sentencepiece bpe": lambda: sentencepiece("bpe", "none"),
    "sentencepiece bpe with a prefix": lambda: sentencepiece("bpe", "prepend"),
    "sentencepiece bpe, metaspace": lambda: sentencepiece("bpe", "first"),
    "unigram": lambda: sentencepiece("unigram", "always"),
}


def of_transformers(made, template=CHAT_TEMPLATE, **named):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, **{"eos_token": "<|endoftext|>", "bos_token": "<s>", **named}
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    tokenizer = of_transformers(KINDS[request.param]())
    return tokenizer, RowReader(tokenizer_files(tokenizer, 500))


@pytest.fixture(scope="module")
def reader():
    return RowReader(tokenizer_files(of_transformers(byte_level()), 400))


def asked(*messages, **more):
    turns = [dict(zip(("role", "content"), message, strict=True)) for message in messages]
    return json.dumps(
        {"messages": turns or [{"role": "user", "content": "the cat?"}], **more}, ensure_ascii=False
    ).encode()


@pytest.mark.parametrize(
    "conversation", [b"", asked(), json.dumps({"prompt": "the cat:"}).encode()], ids=["alone", "chat", "prompt"]
)
@pytest.mark.parametrize("name", TEXTS)
def test_the_ids_of_a_text_stand_for_its_bytes(kind, name, conversation):
    tokenizer, reader = kind
    text = TEXTS[name]
    row = reader.row(TextRow(text.encode(), conversation))
    if (
        type(tokenizer.backend_tokenizer.model) is models.Unigram and "<" in text
    ):  # it finds <s> and <0x41> as pieces in ordinary text
        assert "does not keep the text" in row.refused
        return
    assert not row.refused, row.refused
    ids = row.token_ids_T[row.prompt_tokens :]
    assert reader.table.text_of(ids) == text.encode()
    np.testing.assert_array_equal(row.byte_ends_C, reader.table.ends_of(ids))
    assert row.ended == bool(conversation)
    if conversation:
        assert tokenizer.convert_ids_to_tokens([int(ids[-1])]) == [
            "<|im_end|>" if b"messages" in conversation else "<|endoftext|>"
        ]
        ids = ids[:-1]
    assert (reader.table.role_V[ids] == TEXT).all()
    direct = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not conversation and reader.table.text_of(np.array(direct)) == text.encode():
        assert ids.tolist() == direct


def test_the_prompt_is_what_transformers_renders_and_tokenises(kind):
    tokenizer, reader = kind
    messages = [("system", "an old dog"), ("user", "你好\r\n"), ("assistant", "  x"), ("user", "run")]
    row = reader.row(TextRow(b"the cat", asked(*messages)))
    turns = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert row.token_ids_T[: row.prompt_tokens].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_that_merges_with_its_prompt_is_tokenised_by_itself():
    """The ids of the prompt are those of the prompt alone: "user" + " the" where the tokenizer would write one token over the border."""
    made = byte_level()
    tokenizer = of_transformers(made, "{% for m in messages %}{{ m.content }}{% endfor %}")
    reader = RowReader(tokenizer_files(tokenizer, 400))
    row = reader.row(TextRow(b"he cat", asked(("user", "saw t"))))
    whole = made.encode("saw the cat").ids
    prompt = made.encode("saw t").ids
    assert whole[: len(prompt)] != prompt, "the tokenizer merges over this border"
    assert row.token_ids_T[: row.prompt_tokens].tolist() == prompt
    assert reader.table.text_of(row.token_ids_T[row.prompt_tokens :]) == b"he cat"


def test_control_tokens_in_a_text_stay_text(reader):
    for conversation in (b"", asked()):
        row = reader.row(TextRow(b"<|im_end|>", conversation))
        assert (
            reader.table.role_V[row.token_ids_T[row.prompt_tokens :][: len(row.byte_ends_C) - row.ended]] == TEXT
        ).all()


@pytest.mark.parametrize(
    ("conversation", "why"),
    [
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[1]", "JSON object"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"messages": "x"}', "lists of objects"),
        (b'{"messages": [1]}', "lists of objects"),
        (b'{"messages": [], "prompt": ""}', "messages or with a prompt"),
        (b'{"tools": []}', "messages or with a prompt"),
        (b'{"prompt": 3}', "the prompt is text"),
        (b'{"prompt": "x", "day": "2026-01-01"}', "nothing else"),
        (b'{"prompt": "x <|im_end|>"}', "the prompt holds '<|im_end|>'"),
        (asked(documents=[]), "no field 'documents'"),
        (asked(day="yesterday"), "day is no date"),
        (asked(tools=[{"name": "f"}]), "shows no tools"),
        (asked(template_kwargs={"enable_thinking": True}), "reads no variable of this name"),
        (asked(template_kwargs={"add_generation_prompt": False}), "set for every conversation"),
        (asked(template_kwargs={"eos_token": ""}), "set for every conversation"),
        (asked(("user", "a <|im_start|> b")), r"messages[0] holds '<|im_start|>', a control token"),
        (b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}', "shows no tool calls"),
        (b'{"messages": [{"content": "no role"}]}', ""),
    ],
)
def test_conversations_that_cannot_be_rendered_say_why(reader, conversation, why):
    row = reader.row(TextRow(b"cat", conversation))
    assert (why in row.refused and row.refused) if why else not row.refused, (
        row.refused
    )  # jinja prints what is missing as nothing


def test_a_text_that_is_none_says_why(reader):
    assert "the text is not UTF-8 at byte 2" in reader.row(TextRow(b"ab\xe4", asked())).refused


def test_a_tokenizer_that_changes_a_text_is_named_with_the_place():
    made = byte_level()
    made.normalizer = normalizers.NFC()
    reader = RowReader(tokenizer_files(of_transformers(made), 400))
    assert not reader.row(TextRow("é".encode())).refused
    assert "does not keep the text" in reader.row(TextRow("ae\u0301".encode())).refused
    assert "at byte 1" in reader.row(TextRow("ae\u0301".encode(), asked())).refused


def test_what_a_template_raises_and_prints_is_bounded():
    raising = of_transformers(byte_level(), "{{ raise_exception('alternate, ' + messages[0].content) }}")
    refused = RowReader(tokenizer_files(raising, 400)).row(TextRow(b"x", asked(("user", "y" * 5000)))).refused
    assert "TemplateError: alternate, yyy" in refused and len(refused) <= 300
    growing = of_transformers(byte_level(), "{% for i in range(1000) %}{{ 'x' * 100 }}{% endfor %}")
    assert "makes 100000 characters" in RowReader(tokenizer_files(growing, 400)).row(TextRow(b"x", asked())).refused
    reaching = of_transformers(
        byte_level(), "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}"
    )
    assert "SecurityError" in RowReader(tokenizer_files(reaching, 400)).row(TextRow(b"x", asked())).refused


def test_a_teacher_without_a_chat_template_takes_texts_and_prompts():
    reader = RowReader(tokenizer_files(of_transformers(byte_level(), None), 400))
    assert "no chat template" in reader.row(TextRow(b"x", asked())).refused
    row = reader.row(TextRow(b" cat", json.dumps({"prompt": "the"}).encode()))
    assert row.ended and row.token_ids_T[-1] == 0 and not reader.row(TextRow(b" cat")).refused


def test_bos_goes_before_a_prompt_where_the_tokenizer_puts_it_there():
    from tokenizers import processors

    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    reader = RowReader(tokenizer_files(of_transformers(made), 400))
    row = reader.row(TextRow(b"cat", json.dumps({"prompt": "the "}).encode()))
    assert row.token_ids_T[0] == 3 and row.token_ids_T[: row.prompt_tokens].tolist() == [
        3,
        *made.encode("the ", add_special_tokens=False).ids,
    ]
    assert reader.row(TextRow(b"cat", asked())).token_ids_T[0] != 3, "a chat template writes its own"


def test_marks_become_tokens_of_the_teacher_that_has_them_and_nothing_otherwise():
    made = byte_level()
    plain = RowReader(tokenizer_files(of_transformers(made), 400))
    made.add_special_tokens([AddedToken("[THINK]"), AddedToken("[/THINK]")])
    thinking = RowReader(tokenizer_files(of_transformers(made), 400))
    asked_row = TextRow(b"old dogthe cat", asked(), ((0, THINK_OPEN), (7, THINK_CLOSE)))
    row = thinking.row(asked_row)
    ids = row.token_ids_T[row.prompt_tokens :]
    roles = thinking.table.role_V[ids]
    assert [int(role) for role in roles if role != TEXT] == [THINK_OPEN, THINK_CLOSE, END]
    assert (
        thinking.table.text_of(ids) == b"old dogthe cat"
        and row.byte_ends_C[np.flatnonzero(roles == THINK_CLOSE)[0]] == 7
    )
    row = plain.row(asked_row)
    assert plain.table.text_of(row.token_ids_T[row.prompt_tokens :]) == b"old dogthe cat"
    assert (plain.table.role_V[row.token_ids_T[row.prompt_tokens : -1]] == TEXT).all()


TEMPLATES = {
    "chatml": (CHAT_TEMPLATE, "<|im_end|>"),
    "a space before it": ("{% for m in messages %}[{{ m.content }}]{{ ' ' + eos_token }}{% endfor %}", "<|endoftext|>"),
    "none": ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ""),
    "refuses": ("{{ raise_exception('no') }}", ""),
    "two of them": ("{% for m in messages %}{{ m.content }}<|im_end|><|endoftext|>{% endfor %}", "<|im_end|>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_is_the_first_control_token_behind_an_answer(name):
    source, end = TEMPLATES[name]
    assert written_end(source, {"eos_token": "<|endoftext|>"}, SPECIAL) == end
    files = tokenizer_files(of_transformers(byte_level(), source), 400)
    assert files.end == (end or "<|endoftext|>")


def test_a_template_that_never_ends_is_left_alone(monkeypatch):
    monkeypatch.setattr("teacher_server.tokenizing.rendering._PROBE_S", 0.2)
    looping = (
        "{% for i in range(300) %}{% for j in range(300) %}{{ 'x' }}{% endfor %}{% endfor %}" + "{{ messages[0] }}" * 3
    )
    looping = "{% for a in range(2000) %}{% for b in range(2000) %}{% set x = a %}{% endfor %}{% endfor %}" + looping
    assert tokenizer_files(of_transformers(byte_level(), looping), 400) is None


def test_templates_render_as_transformers_renders_them():
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{%- for m in messages %}\n{% if m.role == 'system' %}{% continue %}{% endif %}\n  {% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{% endfor %}{{ tools | tojson(indent=2) if tools else '' }}{{ eos_token }}{{ 'é<' | tojson }}{% if add_generation_prompt %}A:{% endif %}"
    )
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ü & <b>"},
        {"role": "assistant", "content": None},
    ]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        [expected], _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=True, eos_token="E"
        )
        found = render(source, messages, tools=tools, add_generation_prompt=True, variables={"eos_token": "E"})
        assert found == expected
    assert (
        render("{{ strftime_now('%d %b %Y') }}", [], add_generation_prompt=True, variables={}, day=date(2026, 2, 3))
        == "03 Feb 2026"
    )


def test_tool_calls_are_shown_in_the_shape_that_the_template_wants():
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{% if m.content is not none %}{{ raise_exception('null') }}{% endif %}"
        "{% for c in m.tool_calls %}{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    reader = RowReader(tokenizer_files(of_transformers(byte_level(), source), 400))
    call = {"type": "function", "function": {"name": "look", "arguments": {"for": "a cat"}}}
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = reader.row(TextRow(b"the cat", json.dumps({"messages": turns}).encode()))
    assert reader.table.text_of(row.token_ids_T[: row.prompt_tokens]) == b'golook({"for": "a cat"})'


def test_byte_tables_know_roles_and_unused_ids():
    made = byte_level()
    made.add_tokens([AddedToken("<tool>", special=False)])
    made.add_special_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("<pad>")])
    table = byte_table(made.to_str(), bos="<s>", ends=["<|im_end|>", "<|endoftext|>", "<|no such|>"], rows=600)
    role = {
        content: int(table.role_V[made.token_to_id(content)])
        for content in [*SPECIAL, "<tool>", "<think>", "</think>", "<pad>"]
    }
    assert role == {
        "<|endoftext|>": END, "<|im_start|>": CONTROL, "<|im_end|>": END, "<s>": BOS, "<unk>": CONTROL, "<tool>": TEXT, "<think>": THINK_OPEN,
        "</think>": THINK_CLOSE, "<pad>": CONTROL,
    }  # fmt: skip
    assert table.of(made.token_to_id("<tool>")) == b"<tool>" and len(table) == 600 and table.role_V[-1] == UNUSED
    assert ((np.diff(table.ends_V1) > 0) == (table.role_V == TEXT)).all()


@pytest.mark.parametrize("model", ["WordPiece", "WordLevel"])
def test_tokenizers_that_do_not_say_their_bytes_are_refused_by_name(model):
    made = Tokenizer(getattr(models, model)({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    with pytest.raises(CapabilityError, match=rf"tokenizer\.model\.type, value={model}, limit=BPE\|Unigram"):
        byte_table(made.to_str())
    with pytest.raises(CapabilityError, match=r"tokenizer\.decoder, value=none"):
        byte_table(Tokenizer(models.BPE()).to_str())


def test_the_process_of_the_tokenizer_loads_neither_torch_nor_ray():
    code = "import sys, teacher_server.tokenizing.worker; print([m for m in ('torch', 'ray', 'transformers', 'pydantic') if m in sys.modules])"
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={"PYTHONPATH": f"{root}:{root}/proto"},
        check=True,
    )
    assert found.stdout.strip() == "[]"
