"""What the teacher alone is told of a row: its rendering is that of the row written so, and its targets are the student's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from student_trainer.config.teachers import ContextConfig
from student_trainer.data.dataset import TokenizedDataset, build_dataset
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import DataSource
from student_trainer.data.teacher_view import TeacherContext, TeacherView
from student_trainer.data.text.clock import Clock
from student_trainer.data.token_cache import TokenCache
from student_trainer.errors import DataError
from student_trainer.rollout.examples import example_of
from student_trainer.rollout.sample import Rollout, RolloutPrompt
from tests.student_trainer.data.tiny_tokenizers import tokenizer

HINT = TeacherContext("hint", "{message}\n(Hint: {context})")
QA = [
    {"question": "What is 1 + 1?", "answer": "    2", "hint": "count {message} your fingers"},
    {"question": "Say it in Chinese.", "answer": "你好,世界。", "hint": "<|im_start|> 你"},
    {"question": "naïve café?", "answer": "one\r\ntwo", "hint": "x"},
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Second?"},
    {"role": "assistant", "content": "Two."},
]


def dataset(tmp_path, rows, family="chatml", name="rows", context=None, **settings) -> TokenizedDataset:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_dataset([DataSource(str(path))], tokenizer(family), max_tokens=500, context=context, **settings)


def assert_told(found: TokenizedDataset, plain: TokenizedDataset, edited: TokenizedDataset) -> None:
    """The student reads the rows as they are, the teacher the edited ones."""
    assert len(found) == len(plain) == len(edited) > 0
    for mine, own, other in zip(found, plain, edited, strict=True):
        np.testing.assert_array_equal(mine.example.token_ids, own.example.token_ids)
        np.testing.assert_array_equal(mine.example.loss_mask, own.example.loss_mask)
        assert mine.example.key == own.example.key and mine.example.target_bytes == own.example.target_bytes
        view = mine.example.asked
        np.testing.assert_array_equal(view.token_ids, other.example.token_ids)
        np.testing.assert_array_equal(view.loss_mask, other.example.loss_mask)
        assert not np.array_equal(view.token_ids, mine.example.token_ids)
        np.testing.assert_array_equal(
            view.token_ids[view.loss_mask], mine.example.token_ids[mine.example.loss_mask]
        )  # what is joined by position


@pytest.mark.parametrize("family", ["chatml", "llama", "glm", "plain", "plain_bos"])
def test_the_teacher_reads_the_row_as_if_it_were_written_so(tmp_path, family):
    bare = [{k: v for k, v in row.items() if k != "hint"} for row in QA]
    edited = [
        row | {"question": f"{row['question']}\n(Hint: {hint['hint']})"} for row, hint in zip(bare, QA, strict=True)
    ]
    assert_told(
        dataset(tmp_path, QA, family, context=HINT),
        dataset(tmp_path, bare, family),
        dataset(tmp_path, edited, family, "edited"),
    )


@pytest.mark.parametrize("turns", ["auto", "each", "last"])
@pytest.mark.parametrize("family", ["chatml", "rewriting"])
def test_every_answer_of_a_conversation_stands_behind_what_was_told(tmp_path, turns, family):
    place = 3 if turns == "last" else 1
    edited = [dict(m) for m in TALK]
    edited[place]["content"] += "\n(Hint: h)"
    assert_told(
        dataset(tmp_path, [{"messages": TALK, "hint": "h"}], family, context=HINT, turns=turns),
        dataset(tmp_path, [{"messages": TALK}], family, turns=turns),
        dataset(tmp_path, [{"messages": edited}], family, "edited", turns=turns),
    )


def test_a_system_message_is_changed_or_made(tmp_path):
    context = TeacherContext("hint", "{context}\n{message}", "system")
    rows = [{"messages": TALK, "hint": "Think."}, {"messages": TALK[1:3], "hint": "Think."}]
    edited = [
        {"messages": [{"role": "system", "content": "Think.\nBe brief."}, *TALK[1:]]},
        {"messages": [{"role": "system", "content": "Think."}, *TALK[1:3]]},
    ]
    bare = [{"messages": row["messages"]} for row in rows]
    assert_told(
        dataset(tmp_path, rows, context=context), dataset(tmp_path, bare), dataset(tmp_path, edited, name="edited")
    )


def test_the_configs_system_prompt_is_what_is_changed_where_it_stands(tmp_path):
    context = TeacherContext("hint", "Other: {context}", "system")
    bare = [{k: v for k, v in row.items() if k != "hint"} for row in QA[:1]]
    edited = [{"prompt": [{"role": "system", "content": f"Other: {QA[0]['hint']}"}, {"role": "user", "content": QA[0]["question"]}], "completion": QA[0]["answer"]}]  # fmt: skip
    assert_told(
        dataset(tmp_path, QA[:1], context=context, system_prompt="Mine."),
        dataset(tmp_path, bare, system_prompt="Mine."),
        dataset(tmp_path, edited, name="edited"),
    )


def test_the_reference_answer_may_be_what_is_told(tmp_path):
    """A field that the format reads itself (SDFT, 2601.19897)."""
    bare = [{k: v for k, v in row.items() if k != "hint"} for row in QA]
    edited = [row | {"question": f"{row['question']}\n(Hint: {row['answer']})"} for row in bare]
    context = TeacherContext("answer", HINT.template)
    assert_told(
        dataset(tmp_path, bare, context=context), dataset(tmp_path, bare), dataset(tmp_path, edited, name="edited")
    )


def test_weights_and_traces_keep_their_targets(tmp_path):
    trace = {
        "conversation": [{"role": "user", "content": "Two and two?"}],
        "trace": None,
        "answer": "4",
        "source": "s:1",
    }
    found = dataset(tmp_path, [trace | {"hint": "add"}], context=HINT)
    [item] = list(found)
    assert item.example.weights is not None and item.example.teacher is not None
    assert item.example.teacher.loss_mask.sum() == item.example.loss_mask.sum()


def test_a_field_that_the_teacher_is_told_is_not_said_to_be_unused(tmp_path):
    """Nor refused for its meaning, which has a place now."""
    intake = Intake()
    dataset(
        tmp_path,
        [row | {"documents": "d", "colour": "red"} for row in QA],
        context=TeacherContext("documents"),
        intake=intake,
    )
    assert intake.sources[0].unused == ("colour", "hint")
    with pytest.raises(DataError, match="documents"):
        dataset(tmp_path, [row | {"documents": "d"} for row in QA], context=HINT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hint": None}, r"rows\.jsonl:2: the row lacks the field that teacher\.context shows .* \(field=hint\)"),
        ({"hint": ""}, r"rows\.jsonl:2: what teacher\.context shows to the teacher must be text that is not empty .*field=hint, value=''"),
        ({"hint": ["a"]}, r"rows\.jsonl:2: what teacher\.context shows to the teacher must be text .*field=hint, value=\['a'\]"),
        ({"hint": 3}, r"rows\.jsonl:2: what teacher\.context shows to the teacher must be text .*field=hint, value=3"),
        ({"hint": " \n"}, r"rows\.jsonl:2: what teacher\.context shows to the teacher must be text .*field=hint"),
    ],
)  # fmt: skip
def test_a_row_without_it_is_a_bad_row(tmp_path, change, said):
    rows = [QA[0], {k: v for k, v in (QA[1] | change).items() if v is not None}, QA[2]]
    with pytest.raises(DataError, match=said):
        dataset(tmp_path, rows, context=HINT)
    intake = Intake("skip")
    found = dataset(tmp_path, rows, context=HINT, intake=intake)
    assert [item.example.key[-1] for item in found] == ["1", "3"]
    assert [(bad.line, "teacher" in bad.reason) for bad in intake.bad] == [(2, True)]


def test_a_row_that_has_no_message_for_it_or_other_targets_behind_it_is_named(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": "Hello."}, *TALK[1:3]], "hint": "h"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no message of the user stands before the first answer"):
        dataset(tmp_path, rows, context=HINT)
    context = TeacherContext("hint", "{message} {context}")
    # Without a line break or a token at the border the first letter of an answer merges with what stands before it.
    found = dataset(tmp_path, QA, "plain", context=context)
    assert all(np.array_equal(i.example.token_ids[i.example.loss_mask], i.example.asked.token_ids[i.example.asked.loss_mask]) for i in found)  # fmt: skip


def test_the_same_rows_told_otherwise_are_other_data(tmp_path):
    digests = {dataset(tmp_path, QA, context=context).sha256 for context in (None, HINT, TeacherContext("hint"))}
    assert len(digests) == 3


def test_it_is_kept_with_the_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QA))
    told: list[str] = []

    def load(context):
        cache = TokenCache(tmp_path / "tokens", told.append)
        settings = {} if context is None else {"context": context}
        return cache.dataset(
            [DataSource(str(path))], tokenizer("chatml"), template="auto", template_kwargs={}, clock=Clock(), intake=Intake(),
            system_prompt="", max_tokens=500, **settings,
        )  # fmt: skip

    made, again, other, bare = load(HINT), load(HINT), load(TeacherContext("hint")), load(None)
    assert made.sha256 == again.sha256 and len({made.sha256, other.sha256, bare.sha256}) == 3 and not told
    assert len(list((tmp_path / "tokens").iterdir())) == 3
    for a, b in zip(made, again, strict=True):
        assert b.example.teacher is not None
        np.testing.assert_array_equal(a.example.asked.token_ids, b.example.asked.token_ids)
        np.testing.assert_array_equal(a.example.asked.loss_mask, b.example.asked.loss_mask)


def test_a_rollout_is_asked_behind_the_teachers_own_prompt(tmp_path):
    [item] = list(dataset(tmp_path, [{"messages": TALK, "hint": "h"}], context=HINT))
    row, said = item.example, np.array([7, 8, 9], np.int32)
    rollout = Rollout(RolloutPrompt(3, 1, row.token_ids[:20], row.key), said, np.full(3, -1, np.float32), False, 3)
    found = example_of(rollout, row)
    view = found.asked
    np.testing.assert_array_equal(view.token_ids[view.loss_mask], found.token_ids[found.loss_mask])
    plain = TeacherView(row.asked.token_ids, row.asked.loss_mask)
    targets = np.flatnonzero(plain.loss_mask)
    last = targets[np.flatnonzero(np.diff(targets) > 1)[-1] + 1]
    np.testing.assert_array_equal(view.token_ids, [*plain.token_ids[:last], 7, 8, 9])
    assert view.loss_mask.tolist() == [False] * last + [True] * 3
    assert example_of(rollout).teacher is None
    assert found.sampled_logp_N.tolist() == [-1, -1, -1] and found.target_weights.tolist() == [1, 1, 0]


def test_a_template_without_a_place_for_the_text_is_refused():
    with pytest.raises(ValueError, match=r"must have the place \{context\}"):
        ContextConfig(field="hint", template="{hint}")
    with pytest.raises(ValueError, match="role"):
        ContextConfig(field="hint", role="assistant")
