"""Tags of rows: which teachers are asked about them, what of it is a bad row, and what a dataset keeps of it."""

import json

import numpy as np
import pytest

from student_trainer.data.dataset import build_dataset
from student_trainer.data.readers import Readers
from student_trainer.data.routing import Routing, unclaimed
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import DataSource
from student_trainer.data.teacher_view import TeacherContext
from student_trainer.data.text.clock import Clock
from student_trainer.data.token_cache import TokenCache
from student_trainer.errors import DataError
from tests.student_trainer.data.tiny_tokenizers import tokenizer

ROUTES = (("math", ("math", "logic")), ("prose", ("prose",)), ("rest", ()))
TALK = [
    {"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("user", "3?"), ("assistant", "3"))
]


@pytest.fixture
def source(tmp_path):
    def write(*rows, tags=(), name="rows"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": "q?", "completion": "a"} | row) + "\n" for row in rows))
        return DataSource(str(path), tags=tags)

    return write


def built(source, routing=None, intake=None, **more):
    readers = Readers(routing=routing, tag_field="about", **more)
    return build_dataset([source], tokenizer("chatml"), max_tokens=500, readers=readers, intake=intake, turns="each")


@pytest.mark.parametrize(
    ("tags", "shared", "exclusive"),
    [
        ((), ("rest",), ("rest",)),
        (("math",), ("math", "rest"), ("math",)),
        (("logic", "prose"), ("math", "prose", "rest"), ("math", "prose")),
        (("other",), ("rest",), ("rest",)),
    ],
)
def test_who_is_asked_follows_from_the_tags(tags, shared, exclusive):
    assert Routing(ROUTES).asked(tags) == shared
    assert Routing(ROUTES, exclusive=True).asked(tags) == exclusive


def test_tags_come_from_the_source_and_from_the_field_of_a_row(source):
    data = built(
        source({"about": "math"}, {"about": ["prose", "math"]}, {}, {"about": []}, tags=("prose",)), Routing(ROUTES)
    )
    assert [row.example.tags for row in data] == [("prose", "math"), ("prose", "math"), ("prose",), ("prose",)]
    others = built(source({"about": "math"}, {"about": ["math"]}, {}, {}, tags=("prose",)), Routing(ROUTES))
    assert (
        data.sha256
        == built(
            source({"about": "math"}, {"about": ["prose", "math"]}, {}, {}, tags=("prose",)), Routing(ROUTES)
        ).sha256
    )
    assert others.sha256 == data.sha256, "the same tags, however they are written"
    bare = built(source({}, {}, {}, {}, tags=("prose",)), Routing(ROUTES))
    assert bare.sha256 != data.sha256


@pytest.mark.parametrize(
    ("row", "routes", "told"),
    [
        ({"about": ["math", "prose"]}, ROUTES, "math and prose claim the row"),
        ({"about": "other"}, ROUTES[:2], "no teacher claims the row .its tags are other; known: math, logic, prose."),
        ({}, ROUTES[:2], "no teacher claims the row .it has no tags"),
        ({"about": 3}, ROUTES, "tags are a text or a list of texts"),
        ({"about": ["math", ""]}, ROUTES, "tags are a text or a list of texts"),
        ({"about": {"a": 1}}, ROUTES, "tags are a text or a list of texts"),
    ],
)
def test_a_row_that_no_one_teacher_takes_is_a_bad_row(source, row, routes, told):
    routing = Routing(routes, exclusive=True)
    good = {"about": "math"}
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {told}"):
        built(source(good, row), routing)
    intake = Intake("skip")
    assert len(built(source(good, row, good), routing, intake)) == 2 and [bad.line for bad in intake.bad] == [2]


def test_without_routing_a_field_of_tags_is_one_that_nobody_reads(source):
    data = built(source({"about": 3}))
    assert data[0].example.tags == ()


def test_each_of_several_teachers_is_shown_its_own_context(source):
    hint = TeacherContext("hint")
    data = built(source({"hint": "h", "about": "math"}), Routing(ROUTES), contexts=(("math", hint),))
    example = data[0].example
    assert example.teacher is None and list(example.views) == ["math"]
    assert example.asked_by("math").token_ids.size > example.token_ids.size
    assert np.array_equal(example.asked_by("rest").token_ids, example.token_ids)


@pytest.mark.parametrize("more", [{}, {"contexts": (("math", TeacherContext("hint")),)}, {"tells": True}])
def test_all_of_it_is_kept_with_the_tokens(source, tmp_path, more):
    rows = [{"hint": "h", "about": "math"}, {"messages": TALK, "prompt": None, "completion": None, "hint": "g"}]
    there = source(*(rows[:1] if "contexts" in more else [rows[0], rows[0] | {"about": ["prose", "logic"]}]))
    readers = Readers(routing=Routing(ROUTES), tag_field="about", **more)

    def load():
        cache = TokenCache(tmp_path / "tokens")
        return cache.dataset(
            [there], tokenizer("chatml"), template="auto", template_kwargs={}, clock=Clock(), intake=Intake(), max_tokens=500,
            readers=readers, turns="each",
        )  # fmt: skip

    made, kept = load(), load()
    assert len(list((tmp_path / "tokens").iterdir())) == 1 and made.sha256 == kept.sha256
    for one, other in zip(made, kept, strict=True):
        assert one.example.tags == other.example.tags and one.example.views.keys() == other.example.views.keys()
        told = [
            example.told and (example.told.conversation, example.told.answer_start)
            for example in (one.example, other.example)
        ]
        assert told[0] == told[1] and (told[0] is not None) == ("tells" in more)


def test_what_a_teacher_with_another_tokenizer_is_told_ends_before_the_answer(source, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK, "tools": None}) + "\n")
    data = built(DataSource(str(path)), tells=True)
    told = [json.loads(row.example.told.conversation) for row in data]
    assert [len(one["messages"]) for one in told] == [1, 3] and told[1]["messages"] == TALK[:3]
    for row in data:
        assert row.example.loss_mask[row.example.told.answer_start :].all()
        assert not row.example.loss_mask[: row.example.told.answer_start].any()


def test_tags_that_no_teacher_has_are_counted():
    rows = [("math",), ("Math", "code"), ("code",), ()]
    assert list(unclaimed(Routing(ROUTES), rows).items()) == [("code", 2), ("Math", 1)]
