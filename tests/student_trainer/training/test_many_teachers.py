"""Runs of several teachers as a user meets them: tags, labels ahead, held-out figures, layers, and what a resumed run may change."""

import io
import json
import re

import pytest
from rich.console import Console

from student_trainer.errors import ConfigError, RunError
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from student_trainer.training.run_folder import settled_labels
from teacher_wire.labels.store import LabelStore
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve

SAME = ("tokenizer_sha256", "base_tokenizer_sha256", "added_tokens", "chat_template_sha256", "vocab_rows")


def like(plain: FakeTeacher, **changes) -> FakeTeacher:
    return FakeTeacher(**{name: getattr(plain, name) for name in SAME} | {"hidden_size": 16} | changes)


@pytest.fixture
def other(fake):
    teacher = like(fake, seed=5)
    with serve(teacher) as running:
        teacher.address = running.address
        yield teacher


@pytest.fixture
def two_of(config_of, server, other, rows_file, tmp_path):
    """Sections -> a config of two teachers; changes of each by name. Every third row is of mathematics."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    path = tmp_path / "tagged.jsonl"
    path.write_text(
        "".join(json.dumps(row | ({} if i % 3 else {"about": "math"})) + "\n" for i, row in enumerate(rows))
    )

    def build(*, near=None, far=None, **sections):
        teachers = [
            {"alias": "near", "address": server.address, **(near or {})},
            {"alias": "far", "address": other.address, "weight": 0.5, **(far or {})},
        ]
        data = {"train": [str(path)], "eval": [f"{path}#6"]} | sections.pop("data", {})
        return config_of(teacher=None, teachers=teachers, data=data, **sections)

    return build


def quiet():
    return Console(file=io.StringIO(), width=300)


BY_TAG = {"far": {"tags": ["math"]}, "data": {"tag_field": "about"}}


def test_a_teacher_with_tags_is_asked_about_its_rows_alone(two_of, fake, other):
    config = two_of(**BY_TAG)
    filled = label(config, quiet())
    assert 0 < other.tokens < fake.tokens and filled.usage.teacher_tokens + filled.usage.disk_tokens > 0
    asked = fake.calls, other.calls
    result = train(config, console=quiet())
    assert (fake.calls, other.calls) == asked, "all labels of the run were there"
    assert result.metrics["kl_to_near"] > 0 and result.metrics["kl_to_far"] > 0
    assert "kl_to_teacher" not in result.metrics


def test_rows_are_given_to_one_teacher_each_by_route(two_of, fake, other):
    train(two_of(combine="route", **BY_TAG), console=quiet())
    assert fake.calls and other.calls


@pytest.mark.parametrize("labels", ["hidden", "auto"])
def test_a_teacher_of_no_row_is_refused(two_of, labels):
    with pytest.raises(
        ConfigError, match=r"teacher 'far' is asked about 0 of .* rows of data\.train; its tags are poetry"
    ):
        train(two_of(far={"tags": ["poetry"], "labels": labels}, data={"tag_field": "about"}), console=quiet())


def test_labels_of_one_teacher_alone_are_kept(two_of, tmp_path):
    config = two_of(far={"cache": False})
    train(config, console=quiet())
    kept = {shelf.fingerprint for shelf in LabelStore(tmp_path / "cache" / "labels").scan()[0]}
    fingerprints = json.loads(json.loads((config.run.output_dir / "run.json").read_text())["teachers"])
    assert kept == {fingerprints["near"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"far": {"weight": 0.25}}, r"teachers\.far\.weight: 0\.5 -> 0\.25"),
        ({"far": {"alias": "third"}}, r"teachers\.far\..* -> None.*--allow-other-teachers"),
        ({"far": {"labels": "full"}}, r"teachers\.far\.labels\.transport"),
        ({"combine": "confidence"}, r"combine: 'loss_sum' -> 'confidence'"),
    ],
)
def test_a_run_goes_on_with_the_teachers_it_was_started_with(two_of, change, told):
    train(two_of(), console=quiet())
    with pytest.raises(RunError, match=told):
        train(two_of(**change), resume=True, console=quiet())


def test_another_fingerprint_is_refused_unless_it_is_allowed_and_then_it_is_recorded(two_of, fake):
    config = two_of()
    train(config, console=quiet())
    (config.run.output_dir / "result.json").unlink()
    with serve(like(fake, seed=6)) as changed:
        check_history(two_of(far={"address": changed.address}))


def check_history(config):
    """A run in the folder of one that was started with another second teacher."""
    with pytest.raises(RunError, match=r"far: fingerprint .*--allow-other-teachers"):
        train(config, resume=True, console=quiet())
    said = io.StringIO()
    train(config, resume=True, console=Console(file=said, width=300), allow_other_teachers=True)
    (entry,) = json.loads((config.run.output_dir / "run.json").read_text())["history"]
    assert entry["step"] == 6 and entry["changed"][0].startswith("far: fingerprint")
    assert "from step 6 on with other teachers: far: fingerprint" in said.getvalue()
    hotter = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(RunError, match=r"train\.learning_rate"):
        train(hotter, resume=True, console=quiet(), allow_other_teachers=True)


def test_where_a_teacher_is_does_not_decide_what_a_run_is(two_of, other):
    config = two_of(near={"when_missing": "reweight", "retry_s": 9})
    train(two_of(), console=quiet())
    with serve(other) as elsewhere:
        moved = config.teachers[1].model_copy(update={"address": elsewhere.address})
        config = config.model_copy(update={"teachers": (config.teachers[0], moved)})
        assert train(config, resume=True, console=quiet()).steps == 6


def test_rows_without_a_teacher_learn_from_their_own_tokens_and_are_told(two_of, tmp_path):
    """Whole micro-batches of them too; so are tags that no teacher has."""
    said = io.StringIO()
    misspelt = {"path": str(tmp_path / "tagged.jsonl"), "tags": ["Maths"]}
    tagged = {
        "near": {"tags": ["math"]},
        "far": {"tags": ["math"]},
        "data": {"tag_field": "about", "train": [misspelt]},
    }
    result = train(two_of(train={"batch_size": 1}, **tagged), console=Console(file=said, width=300))
    assert "rows have no teacher" in said.getvalue() and result.steps == 6
    assert re.search(
        r"no teacher has the tags 'Maths' \(\d+ rows\) of data\.train; .* teachers\[\]\.tags", said.getvalue()
    )
    with pytest.raises(ConfigError, match=r"loss\.sft_weight=0 leaves them nothing to learn"):
        train(
            two_of(loss={"sft_weight": 0}, run={"output_dir": str(result.output_dir) + "2"}, **tagged), console=quiet()
        )


def test_what_auto_chose_belongs_to_the_teacher_it_was_chosen_for(two_of, server):
    """Of another set of teachers the old ones keep what was chosen; what a section says in words is what counts."""
    config = two_of(near={"labels": "auto"}, far={"labels": "full"})
    train(config, console=quiet())
    (config.run.output_dir / "result.json").unlink()
    chosen = settled_labels(config)[0].transport
    assert [labels and labels.transport for labels in settled_labels(config)] == [chosen, None]
    near, far = config.teachers
    turned = config.model_copy(update={"teachers": (far, near)})
    assert [labels and labels.transport for labels in settled_labels(turned)] == [None, chosen]
    third = far.model_copy(update={"alias": "third", "address": server.address})
    more = config.model_copy(update={"teachers": (near, far, third)})
    with pytest.raises(RunError, match=r"teachers\.third\..*--allow-other-teachers"):
        train(more, resume=True, console=quiet())
    train(more, resume=True, console=quiet(), allow_other_teachers=True)
