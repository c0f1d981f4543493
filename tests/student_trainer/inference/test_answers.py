"""Loading, prompts, answers: against transformers called directly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.errors import ConfigError, ModelError
from student_trainer.inference.load import load, load_student, locate
from student_trainer.inference.prompts import Prompter, stop_ids
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.text_stream import TextStream, decoded
from student_trainer.inference.writer import StudentWriter
from tests.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

IDS = torch.tensor([[5, 9, 77, 120, 33]])
TALK = (
    Turn("system", "be\nbrief"),
    Turn("user", "the cat 猫"),
    Turn("assistant", "sat 👩‍👩‍👧 "),
    Turn("user", "  and the dog?"),
)


def writer_of(folder, **changes):
    student = load(locate(str(folder)))
    prompter = Prompter(student.tokenizer)
    return StudentWriter(student, prompter), prompter


# ------------------------------------------------------------------ loading


def test_adapter_run_and_checkpoint_give_the_logits_of_peft(adapter, run_folder, model_factory, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_factory("qwen2"), dtype=torch.float32)
    before = base(IDS).logits
    expected = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    for named in (adapter, run_folder, run_folder / "final"):
        model, tokenizer = load_student(named, "cpu", "float32")
        torch.testing.assert_close(model(IDS).logits, expected)
        assert tokenizer.eos_token == "<|im_end|>"
    assert (expected - before).abs().max() > 0.1
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_factory("qwen2"), dtype=torch.float32), adapter
    ).merge_and_unload()
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(tmp_path)
    torch.testing.assert_close(load_student(tmp_path)[0](IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_it_was_before_and_a_base_elsewhere(adapter, run_folder, model_factory, tmp_path):
    assert locate(str(run_folder)).before() == str(model_factory("qwen2"))
    assert locate(str(adapter)).before() == str(model_factory("qwen2"))
    assert locate(str(model_factory("qwen2"))).before() is None
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in adapter.iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(ModelError, match="/gone/base"):
        load(locate(str(moved)))
    found = load(locate(str(moved), base=str(model_factory("qwen2"))))
    torch.testing.assert_close(found.model(IDS).logits, load_student(adapter)[0](IDS).logits)


def test_what_is_no_model_is_told(tmp_path, model_factory, run_folder):
    unfinished = tmp_path / "run"
    (unfinished / "checkpoint-4").mkdir(parents=True)
    (unfinished / "checkpoint-12").mkdir()
    (unfinished / "config.yaml").write_text("model: {path: x}\n")
    cases = {
        "/no/such/folder": "no such folder",
        str(tmp_path): "is no run folder",
        str(unfinished): r"has not ended; name one of its checkpoints \(checkpoint-4, checkpoint-12\)",
    }
    for named, told in cases.items():
        with pytest.raises(ModelError, match=told):
            locate(named)
    with pytest.raises(ConfigError, match=r"--base x: .* is a whole model"):
        locate(str(model_factory("qwen2")), base="x")
    for wrong in ({"dtype": "int4"}, {"device": "gpu"}, {"device": "cuda:63"}):
        with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
            load(locate(str(model_factory("qwen2"))), **wrong)


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize("last", [2, 4])
def test_prompts_are_token_for_token_the_templates(tmp_path, last):
    """Oracle: `apply_chat_template` with a generation prompt."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    messages = [turn.message for turn in TALK[:last]]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Prompter(tokenizer).ids([Conversation(TALK[:last])]) == [expected]


def test_a_control_token_that_is_typed_stays_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    [ids] = Prompter(tokenizer).ids([Conversation((Turn("user", "a<|im_end|>b"),))])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1, "the template's own"
    assert "a<|im_end|>b" in tokenizer.decode(ids)


def test_ends_are_those_of_generation_config_tokenizer_and_template(tmp_path):
    make_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    student = load(locate(str(tmp_path)))
    other = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    student.tokenizer.chat_template = other
    assert stop_ids(student.causal_lm, Prompter(student.tokenizer)) == {7, 0, 2}


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("text", ["猫が座った", "👩‍👩‍👧‍👦 ok 🇳🇴!", "naïve café\n\n  x", "a\u2028b", "𝔘𝔫𝔦 العربية"])
def test_streamed_text_is_whole_characters_and_joins_to_the_text(tmp_path, text):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) == text and stream.finish() == ""


def test_streamed_text_of_any_ids_joins_to_the_tokenizers(tmp_path):
    """Broken bytes too, which come out at the end or when the next character is whole."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    rng = np.random.default_rng(3)
    for _ in range(300):
        ids = rng.integers(0, 300, rng.integers(1, 30)).tolist()
        stream = TextStream(tokenizer)
        said = "".join(map(stream.push, ids)) + stream.finish()
        assert said == decoded(tokenizer, ids)


# ------------------------------------------------------------------ answers


def greedy(folder, prompt, count, ends):
    """The model called directly over whole sequences."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count and not (len(ids) > len(prompt) and ids[-1] in ends):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_are_the_models_own_whoever_is_beside_them(model_factory):
    folder = model_factory("qwen2")
    writer, prompter = writer_of(folder)
    prompts = prompter.ids(
        [Conversation((Turn("user", text),)) for text in ("the cat", "an old dog sat on a mat", "猫")]
    )
    first = greedy(folder, prompts[0], 12, ())
    writer.stop_ids = frozenset({first[6], 2})  # a token that does come
    expected = [greedy(folder, prompt, 12, writer.stop_ids) for prompt in prompts]
    made = writer.write(prompts, Sampling(max_new_tokens=12))
    assert [list(one.ids) for one in made] == expected
    assert made[0].finish == "stop" and made[0].tokens == len(made[0].ids) - 1 == first.index(first[6])
    for prompt, one in zip(prompts, made, strict=True):
        assert tuple(writer.stream(prompt, Sampling(max_new_tokens=12))) == one.ids
    assert writer.write(prompts[:1], Sampling(max_new_tokens=12), ignore_ends=True)[0].tokens == 12


def test_a_sample_is_its_own_stream(model_factory):
    """The seed and the number decide it, not the company; another number writes something else."""
    writer, prompter = writer_of(model_factory("qwen2"))
    [prompt] = prompter.ids([Conversation((Turn("user", "the cat"),))])
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=40, max_new_tokens=16, seed=3)
    four = writer.write([prompt] * 4, sampling, [5, 6, 7, 8])
    assert len({one.ids for one in four}) == 4
    assert writer.write([prompt] * 2, sampling, [7, 5]) == [four[2], four[0]]
    assert tuple(writer.stream(prompt, sampling, 6)) == four[1].ids


def test_draws_follow_the_distribution():
    """Frequencies of 20,000 draws within five standard deviations of softmax(z / temperature), cut to top-k."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    sampling = Sampling(temperature=0.7, top_k=3, seed=11)
    expected = torch.where(logits >= 1.0, logits / 0.7, -torch.inf).softmax(-1)
    drawn = torch.cat([
        sampling.processors(range(start, start + 500))(None, logits.expand(500, -1).clone()).argmax(-1)
        for start in range(0, 20_000, 500)
    ])  # fmt: skip
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0"),
        ({"top_k": 5}, "mean nothing at --temperature 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        Sampling(**settings)


def test_closing_a_stream_stops_the_writing_and_a_long_prompt_is_refused(model_factory):
    writer, _ = writer_of(model_factory("qwen2"))
    stream = writer.stream([5, 6, 7], Sampling(max_new_tokens=120))
    next(stream)
    stream.close()  # joins the thread
    with pytest.raises(ConfigError, match=r"100 tokens and --max-new-tokens 29 are more than the 128 positions"):
        next(writer.stream(range(3, 103), Sampling(max_new_tokens=29)))
