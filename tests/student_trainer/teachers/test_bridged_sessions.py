"""Teachers with another tokenizer: their tokens of the rows, what they are asked, and what is refused."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from student_trainer.data.inputs import load_run_data
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.findings import Findings
from student_trainer.model.load import load_outline
from student_trainer.teachers.connect import connections
from student_trainer.teachers.meeting.described import meet
from student_trainer.teachers.rows import bridging
from student_trainer.teachers.session import open_sessions
from student_trainer.training.checks import check_taught
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from teacher_wire.core.errors import CapabilityError, MismatchError
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.testing.loopback import serve

READER = FakeTokenizer((b"the ", b" the", b"an", b"er", b"is", b"12", b"."))


@pytest.fixture
def stranger():
    """A teacher whose tokenizer is another than the student's, and its address."""
    teacher = FakeTeacher(vocab_rows=len(READER), hidden_size=16, reader=READER)
    with serve(teacher) as running:
        teacher.address = running.address
        yield teacher


def opened(config, findings=None, **options):
    said = io.StringIO()
    console = Console(file=said, width=300)
    student = load_outline(config.model)
    read = load_run_data(config, student.tokenizer, console)
    with connections(config.every_teacher, console) as reached:
        (data, held_out), described = meet(
            config,
            reached,
            student,
            read,
            lambda: load_run_data(config, student.tokenizer, console, tells=True),
            console,
        )
        sessions = open_sessions(
            config, reached, student, data, held_out, console, findings or Findings(), described=described, **options
        )
    return sessions, data, held_out, said.getvalue()


def test_a_teacher_with_another_tokenizer_reads_the_rows_in_its_own_tokens(config_of, stranger):
    config = config_of(teacher={"address": stranger.address, "cross_tokenizer": {"min_coverage": 0}})
    (session,), data, _, said = opened(config)
    assert session.bridge is not None and "another tokenizer" in said and "one to one" in said
    assert session.spec.vocab_rows == len(READER) and session.vocab_rows != len(READER)
    student = load_outline(config.model)
    examples = [row.example for row in data]
    asked = session.asked(examples)
    assert asked.sequences == tuple(range(len(examples)))
    groups = asked.groups
    labels_N = np.concatenate([example.token_ids[example.loss_mask] for example in examples])
    labels_M = asked.request.batch.labels_N()
    for (a, b), (c, d) in zip(groups.student_G2, groups.teacher_G2, strict=True):
        theirs = READER.table.text_of(labels_M[c:d])
        ours = student.tokenizer.decode(labels_N[a:b])
        assert theirs.decode(errors="replace") == ours or (not theirs and ours in student.tokenizer.all_special_tokens)
    assert (groups.student_G2[:, 1] - groups.student_G2[:, 0]).max() >= 1


def test_what_it_was_asked_is_kept_on_disk(config_of, stranger):
    config = config_of(teacher={"address": stranger.address})
    opened(config)
    calls = stranger.tokenize_calls
    assert calls
    opened(config)
    assert stranger.tokenize_calls == calls


def test_rows_below_the_least_coverage_are_not_labelled(config_of, stranger):
    config = config_of(teacher={"address": stranger.address, "cross_tokenizer": {"min_coverage": 0.4}})
    (session,), data, _, said = opened(config)
    labelled = [session.responsible(row.example) for row in data]
    assert 0 < sum(labelled) < len(data) and "cross_tokenizer.min_coverage=0.4 and not labelled" in said
    findings = Findings()
    findings.add(check_taught(config, [session], data))
    assert "have no teacher" in findings.all[-1].fix
    silent = config.model_copy(update={"loss": config.loss.model_copy(update={"sft_weight": 0.0})})
    with pytest.raises(ConfigError, match=r"sft_weight=0 leaves them nothing to learn"):
        Findings().add(check_taught(silent, [session], data))


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"labels": {"transport": "given"}, "loss": {"output": {"divergence": "pg_rkl"}}, "on_policy": {"share": 1}}, "given holds no distribution"),
        ({"labels": {"transport": "top_k", "k": 8, "extra_ids": 2}}, r"labels\.extra_ids.*mean nothing to it"),
        ({"on_policy": {"share": 0.5, "max_new_tokens": 4}}, "cannot be asked about what the student writes"),
        ({"loss": {"hidden": {"weight": 1.0}}}, r"loss\.hidden: .*another tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_with_another_tokenizer_is_refused_by_name(config_of, stranger, sections, match):
    with pytest.raises(ConfigError, match=match):
        opened(config_of(teacher={"address": stranger.address}, **sections))


def test_a_server_that_cannot_tokenise_is_refused_as_ever(config_of, stranger):
    stranger.reader, stranger.tokenizer_sha256 = None, "f" * 64
    with pytest.raises(MismatchError, match="another tokenizer"):
        opened(config_of(teacher={"address": stranger.address}))


def test_a_run_learns_from_it_and_measures_it(config_of, stranger):
    config = config_of(
        teacher={"address": stranger.address, "cross_tokenizer": {"min_coverage": 0}}, train={"eval_steps": 3}
    )
    result = train(config, console=Console(file=io.StringIO(), width=300))
    assert result.metrics["kl_to_teacher"] > 0 and any(entry.get("loss", 0) > 0 for entry in result.curve)
    identity = json.loads((result.output_dir / "run.json").read_text())
    assert json.loads(identity["bridges"]) and identity["date"]


def test_two_teachers_one_of_another_tokenizer(config_of, stranger, server):
    teachers = [
        {"alias": "near", "address": server.address, "weight": 0.6},
        {
            "alias": "far",
            "address": stranger.address,
            "weight": 0.4,
            "labels": "top_k",
            "cross_tokenizer": {"min_coverage": 0},
        },
    ]
    config = config_of(teacher=None, teachers=teachers, labels={"transport": "hidden"})
    result = train(config, console=Console(file=io.StringIO(), width=300))
    assert result.metrics["kl_to_near"] > 0 and any(
        "alm_loss.far" in entry and entry["kd_loss.near"] > 0 for entry in result.curve
    )


def test_the_day_is_the_runs_own_although_the_students_template_prints_none(config_of, stranger):
    config = config_of(
        teacher={"address": stranger.address, "cross_tokenizer": {"min_coverage": 0}}, data={"date": "2026-01-02"}
    )
    _, data, _, _ = opened(config)
    assert data.rendering.day == "2026-01-02"
    assert json.loads(data[0].example.told.conversation).get("day") in ("2026-01-02", None)
    stranger.tokenizer_sha256 = "f" * 64
    stranger.reader = None
    with pytest.raises(ConfigError, match=r"data\.date=2026-01-02: the chat template prints no date"):
        opened(config)


def test_labels_ahead_of_a_run_are_those_it_asks_for(config_of, stranger):
    config = config_of(teacher={"address": stranger.address, "cross_tokenizer": {"min_coverage": 0}})
    label(config, Console(file=io.StringIO(), width=300))
    asked = stranger.calls
    train(config, console=Console(file=io.StringIO(), width=300))
    assert stranger.calls == asked


def test_layers_are_learned_from_the_first_teacher_of_the_students_tokenizer(config_of, stranger, server):
    teachers = [{"alias": "far", "address": stranger.address}, {"alias": "near", "address": server.address}]
    hidden = {"hidden": {"weight": 1.0, "reduction": "none", "layers": [1]}}
    config = config_of(teacher=None, teachers=teachers, loss=hidden)
    sessions, *_ = opened(config)
    assert [(session.name, session.features is not None) for session in sessions] == [("far", False), ("near", True)]
    named = {"hidden": hidden["hidden"] | {"teacher": "far"}}
    with pytest.raises(
        ConfigError, match=r"loss\.hidden: teacher 'far' has another tokenizer.*loss\.hidden\.teacher to another"
    ):
        opened(config_of(teacher=None, teachers=teachers, loss=named))


def test_a_student_whose_tokens_do_not_say_their_bytes_is_named(config_of, stranger, monkeypatch):
    def refuse(*_, **__):
        raise CapabilityError("the bytes of its tokens are not known", field="tokenizer.model.type", value="WordPiece")

    monkeypatch.setattr(bridging, "byte_table", refuse)
    config = config_of(teacher={"address": stranger.address})
    with pytest.raises(ModelError, match=r"model\.path .*WordPiece.*take a teacher with the student's tokenizer"):
        opened(config)


def test_how_tokens_are_joined_does_not_change_between_a_run_and_its_resumption(config_of, stranger):
    def config(**settings):
        return config_of(teacher={"address": stranger.address, "cross_tokenizer": {"min_coverage": 0.1, **settings}})

    train(config(), console=Console(file=io.StringIO()))
    (config().run.output_dir / "result.json").unlink()
    with pytest.raises(RunError, match=r"cross_tokenizer: .*tokens of another tokenizer.*--allow-other-teachers"):
        train(config(alm_weight=0.75), resume=True, console=Console(file=io.StringIO()))
    train(config(alm_weight=0.75), resume=True, console=Console(file=io.StringIO()), allow_other_teachers=True)
    (entry,) = json.loads((config().run.output_dir / "run.json").read_text())["history"]
    assert entry["changed"] == ["how tokens of another tokenizer are joined"]
