"""The section `teachers`: what is refused by name, and that a list of one is the section `teacher`."""

import pytest
import yaml

from student_trainer.config.run import TrainConfig, dump_config, parse_config
from student_trainer.errors import ConfigError

BASE = {
    "run": {"output_dir": "/tmp/run", "cache_dir": "/tmp/cache"},
    "model": {"path": "m"},
    "data": {"train": ["rows.jsonl"]},
}
A = {"name": "a", "address": "h:1", "labels": "hidden"}
B = {"name": "b", "address": "h:2", "labels": "hidden", "weight": 0.5}
MATH = {**A, "tags": ["math"]}


def parsed(*teachers, **sections):
    return parse_config({**BASE, "teachers": list(teachers), **sections}, "test")


@pytest.mark.parametrize(
    ("teachers", "sections", "told"),
    [
        ([A, B], {"teacher": {"address": "h:3"}}, "teacher and teachers: set one of them"),
        ([A, A], {}, "give each another name, or another alias"),
        ([A, {"address": "h:2"}], {}, r"teachers\[1\] has no name.*teachers\[1\]\.alias"),
        ([{"address": "h:1"}, {"address": "h:2"}], {}, r"teachers\[0\] has no name"),
        ([A, {**B, "alias": "b c"}], {}, "letters, digits and _ . - alone"),
        ([A, {**B, "weight": 0}], {}, r"teachers\.1\.weight"),
        ([A, {**B, "labels": {"transport": "top_k", "extra_ids": 3}}], {}, r"labels\.extra_ids=3 of teacher 'b'"),
        ([A, B], {"labels": {"transport": "top_k", "extra_ids": 3}, "teachers": [A, {**B, "labels": None}]}, "extra_ids=3 of teacher 'b'"),
        ([A, {**B, "labels": "top_k"}], {"combine": "prob_mix"}, r"teacher 'b' has labels\.transport=top_k: hidden or full"),
        ([A, {**B, "labels": "auto"}], {"combine": "prob_mix"}, r"teacher 'b' has labels\.transport=auto: hidden or full"),
        ([A, B], {"combine": "route"}, "a and b have no tags"),
        ([MATH, {**B, "tags": "math"}], {"combine": "route", "data": {"train": ["r"], "tag_field": "t"}}, "two teachers have the tag 'math'"),
        ([MATH, B], {}, "no row has tags: set data.tag_field"),
        ([A, B], {"data": {"train": ["r"], "tag_field": "t"}}, "no teacher has tags"),
        ([A, B], {"data": {"train": [{"path": "r", "tags": ["t"]}]}}, "no teacher has tags"),
        ([{**A, "tags": ["math", "math"]}, B], {"data": {"train": ["r"], "tag_field": "t"}}, "the tag 'math' is there twice"),
        ([A, B], {"loss": {"hidden": {"teacher": "c", "weight": 1}}}, r"loss\.hidden\.teacher: no teacher is called 'c'; there are: 'a', 'b'"),
        ([A, B], {"loss": {"output": {"divergence": "pg_rkl"}}}, "pg_rkl learns from one teacher"),
        ([A, B], {"on_policy": {"share": 0, "publish": {"teacher": "a", "every": 2}}}, r"on_policy\.publish belongs to one teacher"),
        ([], {"combine": "route", "teacher": {"address": "h:3"}}, "combine and when_missing belong to the section teachers"),
        ([A, {**B, "cross_tokenizer": {"min_coverage": 2}}], {}, r"cross_tokenizer\.min_coverage"),
        ([A, {**B, "when_missing": "drop"}], {}, r"teachers\.1\.when_missing"),
        ([A, {**B, "labels": {"transport": "full", "k": 8}}], {}, r"teachers\.1\.labels.*k=8 belongs to transport top_k, not full"),
        ([A, B], {"labels": {"k": 64}}, r"labels.*k=64 belongs to transport top_k, not hidden"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(teachers, sections, told):
    with pytest.raises(ConfigError, match=told):
        parsed(*teachers, **sections)


@pytest.mark.parametrize(
    "labels",
    [{"k": 128}, {"transport": "auto", "k": 8}, {"transport": "given", "k": 8}, {"transport": "top_k", "k": 8}],
)
def test_where_k_may_count_it_may_be_said(labels):
    """`auto` may come to `top_k`, held-out rows of a run by `given` are measured by it; 128 is what every saved config says."""
    config = parse_config({**BASE, "teacher": {"address": "h:3"}, "labels": labels}, "test")
    assert config.labels.k == labels["k"] and parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_a_list_of_one_is_the_section_teacher():
    settings = {"retry_s": 7, "context": {"field": "hint"}}
    one = parsed(A | settings | {"alias": "x", "weight": 3, "labels": "full", "cache": False}, combine="confidence")
    plain = {name: value for name, value in A.items() if name != "labels"} | settings
    section = {"teacher": plain, "labels": {"transport": "full"}, "cache": {"labels": False}}
    assert dump_config(one) == dump_config(parse_config({**BASE, **section}, "test"))
    assert (
        isinstance(one, TrainConfig)
        and one.context is not None
        and one.labels_of(one.every_teacher[0]).transport == "full"
    )


@pytest.mark.parametrize("more", [{"tags": ["math"]}, {"when_missing": "fail"}])
def test_a_list_of_one_that_says_more_stays_a_list(more):
    config = parsed(A | more, data={"train": [{"path": "r", "tags": ["math"]}]} if "tags" in more else BASE["data"])
    assert config.teacher is None and len(config.every_teacher) == 1


def test_what_a_teacher_leaves_out_is_the_runs():
    config = parsed(
        {**A, "labels": None},
        {**B, "when_missing": "fail", "cache": False},
        when_missing="reweight",
        labels={"transport": "full"},
    )
    a, b = config.teachers
    assert (config.labels_of(a).transport, config.labels_of(b).transport) == ("full", "hidden")
    assert (config.when_away(a), config.when_away(b)) == ("reweight", "fail")
    assert (config.keeps_labels(a), config.keeps_labels(b)) == (True, False)
    assert config.contexts == {} and config.context is None
