"""Traces as training rows: the text of both tasks, a weight for every character and token, and what is refused."""

import json

import numpy as np
import pytest

from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import DataSource
from student_trainer.data.text.encoding import token_weights
from student_trainer.data.trace_rows import TraceTasks
from student_trainer.data.trace_schema import Answer, Evidence, Step, Trace, prompt_sha256, to_fields
from student_trainer.errors import DataError
from tests.student_trainer.data.tiny_tokenizers import tokenizer

PROMPT = "苹果 5 🍎 and 7 pears?"


def quote(number, text):
    start = PROMPT.encode().index(text.encode())
    return Evidence(number, start, start + len(text.encode()), text)


TRACE = Trace(
    steps=(
        Step(1, "extract", "two kinds", (0, 1), (), 0.5),
        Step(2, "compute", "5+7=12", (), (1,), 0.25),
    ),
    evidence=(quote(0, "5 🍎"), quote(1, "7 pears")),
    answer=Answer("12", "12", 0.8),
    prompt_sha256=prompt_sha256(PROMPT),
)
TEXT = '<think>\n1. two kinds [ev: "5 🍎", "7 pears"]\n2. 5+7=12\n</think>\n12'


def row(trace=TRACE, answer="12", **changes):
    fields = {
        "conversation": [{"role": "user", "content": PROMPT}],
        "trace": to_fields(trace) if isinstance(trace, Trace) else trace,
        "answer": answer,
        "source": "x:1",
    }
    return fields | changes


def dataset(tmp_path, *rows, family="chatml", template="auto", **tasks):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in rows))
    made = tokenizer(family)
    data = build_dataset([DataSource(str(path))], made, template=template, max_tokens=999, traces=TraceTasks(**tasks))
    return [item.example for item in data], made, data


def shown(example, made):
    whole = made.decode(example.token_ids)
    target = made.decode(example.token_ids[example.loss_mask])
    return whole[: len(whole) - len(target)], target


@pytest.mark.parametrize("family", ["chatml", "llama"])
def test_a_row_teaches_two_tasks(tmp_path, family):
    (reason, answer), made, data = dataset(tmp_path, row(), family=family)
    end = made.eos_token
    assert [example.key.rpartition(":")[2] for example in (reason, answer)] == ["1[reason]", "1[answer]"]
    before, target = shown(reason, made)
    assert f"[reason] {PROMPT}" in before and target == TEXT + end
    before, target = shown(answer, made)
    assert f"[answer] {PROMPT}" in before and target == "12" + end
    assert answer.target_bytes == 2 and reason.target_bytes == len(TEXT.encode())
    changed = dataset(tmp_path, row(), family=family, step_weight=0.7)[2]
    assert changed.sha256 != data.sha256, "other weights, other data"


def test_every_token_has_the_weight_of_its_part(tmp_path):
    (reason, answer), made, _ = dataset(tmp_path, row(), gamma=2.0, reason_share=3.0)
    sure = 0.8**2
    assert np.allclose(answer.target_weights, sure)
    parts = {  # docs/concepts/method.md 7.3: c_ans^gamma * part
        "kinds": 0.5 * 0.5**2 * 1.2, "7=": 0.5 * 0.25**2, "pears": 0.25, "think>": 0.1, "[ev": 0.1, "12<|im_end|>": 1.0,
    }  # fmt: skip
    ids = reason.token_ids[reason.loss_mask]
    pieces = [made.decode([token_id]) for token_id in ids]
    ends = [len(made.decode(ids[: i + 1])) for i in range(len(ids))]
    target = made.decode(ids)
    for text, weight in parts.items():
        at = target.rindex(text) if text.startswith("12") else target.index(text)
        inside = [i for i in range(len(ids)) if ends[i] - len(pieces[i]) >= at and ends[i] <= at + len(text)]
        assert inside
        assert np.allclose(reason.target_weights[inside], weight * sure * 3), text


def test_a_token_across_a_border_has_the_mean_weight():
    made = tokenizer("chatml")
    text = "assistant assistant"
    (word,) = {len(ids) for ids in [made(text, add_special_tokens=False)["input_ids"]]}
    for border in range(1, len(text)):
        spans = made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        weights = token_weights(spans, ((border, 1.0), (len(text) - border, 3.0)), len(text))
        expected = [np.mean([1.0 if i < border else 3.0 for i in range(a, b)]) for a, b in spans]
        assert len(weights) == word and np.allclose(weights, expected)


def test_what_weighs_nothing_is_not_asked_about(tmp_path):
    (reason, _), made, _ = dataset(tmp_path, row(), markup_weight=0.0, evidence_weight=0.0)
    target = made.decode(reason.token_ids[reason.loss_mask])
    assert "think" not in target and "pears" not in target and target.endswith("12<|im_end|>")


def test_without_a_trace_only_the_answer_is_taught(tmp_path):
    examples, made, _ = dataset(tmp_path, row(None, " 12 "), row())
    assert [example.key.rpartition("[")[2] for example in examples] == ["answer]", "reason]", "answer]"]
    assert np.all(examples[0].target_weights == 1) and shown(examples[0], made)[1] == "12<|im_end|>"
    alone, made, _ = dataset(tmp_path, row(answer=None), tasks=("answer",))
    assert shown(alone[0], made)[1] == "12<|im_end|>"
    plain, made, _ = dataset(tmp_path, row(), family="plain")
    assert shown(plain[0], made)[1].startswith(TEXT)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (row(conversation=[{"role": "user", "content": PROMPT + "!"}]), "another prompt"),
        (row(Trace(TRACE.steps, (Evidence(0, 0, 3, "5"),), TRACE.answer, TRACE.prompt_sha256)), "stands in the prompt"),
        (row({"steps": []}), "schema"),
        (row(None, None), "neither an answer nor a trace"),
        (row(conversation=[]), "list of messages"),
        (row(conversation=[{"role": "assistant", "content": "x"}]), "must be the user's"),
    ],
)
def test_rows_that_lie_are_refused(tmp_path, fields, said):
    with pytest.raises(DataError, match=said):
        dataset(tmp_path, fields)


@pytest.mark.parametrize(
    ("tasks", "field"),
    [
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("answer", "answer")}, "tasks"),
        ({"tasks": ("guess",)}, "tasks"),
        ({"reason_prefix": "x", "answer_prefix": "x"}, "reason_prefix"),
        ({"answer_weight": 0.0}, "weight above 0"),
    ],
)
def test_settings_that_teach_nothing_are_refused(tmp_path, tasks, field):
    with pytest.raises(DataError, match=field):
        dataset(tmp_path, row(), **tasks)
    with pytest.raises(DataError, match="anything for tasks"):
        dataset(tmp_path, row(None), tasks=("reason",))
