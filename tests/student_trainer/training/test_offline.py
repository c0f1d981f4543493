"""One card is enough: labels are filled in while the teacher is up, and the run is trained after it has gone; nothing is taken on trust."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest
import yaml
from rich.console import Console

from student_trainer.cli import main
from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError, OfflineError
from student_trainer.teachers import connect
from student_trainer.teachers.offline.record import keep_record, read_record, record_files, records_folder
from student_trainer.training.checks import all_findings
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.training.test_train import QUIET, adapter_hash, losses

LAYERS = {
    "hidden": {"weight": 1.0, "layers": [1, 3], "rank": 6},
    "attention": {"weight": 0.3, "layers": [2]},
    "ffn": {"weight": 0.2, "layers": [[3, 5]]},
}


class _Stop(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture
def config_in(tmp_path, model_factory, rows_file):
    """Name of a run, an address and sections -> its config; `cache` names the cache folder."""

    def build(name, address, cache_name="cache", model=None, **sections):
        where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / cache_name)}
        tree = run_config(tmp_path, model or model_factory("qwen2"), rows_file, address, run=where, **sections)
        return parse_config(tree, "test")

    return build


def labels_in(folder):
    return sorted((folder / "labels").rglob("*.safetensors"))


def test_a_run_without_its_teacher_is_the_run_with_it(config_in, fake, monkeypatch, tmp_path):
    """Labelled, the server stopped, trained, killed, taken up again: the adapter is that of a run that asked for everything itself."""
    steps = {"eval_steps": 3}
    with serve(fake) as server:
        address = server.address
        train(config_in("online", address, "of_its_own", train=steps), console=QUIET)
        label(config_in("one_card", address, train=steps), QUIET)
    offline = config_in("one_card", address, train=steps, teacher={"offline": True})
    calls, original = fake.calls, DistillationTrainer.compute_loss

    def dying(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", dying)
    with pytest.raises(_Stop):
        train(offline, console=QUIET)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", original)
    told = Console(file=io.StringIO(), width=300)
    result = train(offline, resume=True, console=told)
    assert "resuming at step 4" in told.file.getvalue() and "offline: FakeTeacher float32" in told.file.getvalue()
    assert adapter_hash(tmp_path / "one_card") == adapter_hash(tmp_path / "online")
    assert losses(tmp_path / "one_card") == losses(tmp_path / "online")
    assert result.usage.teacher_tokens == 0 and fake.calls == calls


def test_layers_and_their_basis_are_kept_too(config_in, model_factory, tmp_path):
    """States in the teacher's components, attention, FFN and the report on layers: all answered from disk."""
    student = model_factory("qwen2", num_hidden_layers=4)
    sections = {"model": student, "loss": LAYERS, "labels": {"transport": "full"}, "train": {"max_steps": 2}}
    with serve(fake_for(model_factory("qwen2"), layers=6, basis_rank=8)) as server:
        label(config_in("run", server.address, **sections), QUIET)
        offline = config_in("run", server.address, **sections, teacher={"offline": True})
        online = config_in("online", server.address, **sections)
        train(online, console=QUIET)
    train(offline, console=QUIET)
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "online")
    assert (tmp_path / "run" / "layers.json").read_text() == (tmp_path / "online" / "layers.json").read_text()
    (basis,) = (tmp_path / "cache" / "layer_basis").iterdir()
    basis.unlink()
    with pytest.raises(OfflineError, match=r"layer basis .* student-trainer label"):
        train(config_in("other", "", **sections, teacher={"offline": True}), console=QUIET)


def test_what_is_missing_is_said_before_step_0_and_filled_in_by_the_command_that_is_named(config_in, fake, tmp_path):
    with serve(fake) as server:
        config = config_in("run", server.address)
        offline = config_in("run", server.address, teacher={"offline": True})
        with pytest.raises(OfflineError, match=r"does not know the teacher; .*student-trainer label CONFIG"):
            train(offline, console=QUIET)
        label(config, QUIET)
        kept = labels_in(tmp_path / "cache")
        kept[0].unlink()
        kept[1].write_bytes(kept[1].read_bytes()[:-1])  # torn by a power cut
        with pytest.raises(
            OfflineError, match=r"labels of 2 of \d+ sequences .*rows\.jsonl:\d+.* teacher\.offline=false"
        ):
            train(offline, console=QUIET)
        bad = [found for found in all_findings(offline, QUIET) if not found.ok]
        assert [found.setting for found in bad] == ["teacher.offline"]
        assert not (tmp_path / "run").exists()
        assert label(config, QUIET).usage.teacher_sequences == 2
    other = config_in("run", server.address, teacher={"offline": True}, labels={"transport": "full"})
    with pytest.raises(OfflineError, match=r"labels of (\d+) of \1 sequences .*of this teacher there are: hidden \d+"):
        train(other, console=QUIET)
    damaged = labels_in(tmp_path / "cache")
    for path in damaged:  # as long as they were: only reading them shows it
        path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)
    with pytest.raises(OfflineError, match=r"rows\.jsonl:\d+.*: teacher 'fake' is offline.*missing, or damaged"):
        train(offline, console=QUIET)


def test_two_revisions_never_mix(config_in, model_factory, fake, tmp_path):
    """The same address, other weights: which of them is meant must be said, here and while the teacher is up."""
    newer = fake_for(model_factory("qwen2"), seed=1)
    steps = {"train": {"max_steps": 1}, "data": {"eval": []}}
    for teacher in (fake, newer):
        with serve(teacher) as server:
            keep_record(tmp_path / "cache", teacher.teacher_info(), "there:1", pytest.fail)
            label(config_in("run", server.address, **steps), QUIET)
    assert len(record_files(records_folder(tmp_path / "cache"))) == 2
    offline = {"offline": True, "address": "there:1"}
    with pytest.raises(OfflineError, match="knows 2 teachers met at there:1, whose labels must not be mixed"):
        train(config_in("run", None, **steps, teacher=offline), console=QUIET)
    with pytest.raises(OfflineError, match="knows no teacher met at elsewhere:1; there are: fake "):
        train(config_in("run", None, **steps, teacher={"offline": True, "address": "elsewhere:1"}), console=QUIET)
    chosen = newer.teacher_info().fingerprint[:12]
    train(config_in("run", None, **steps, teacher={"offline": True, "fingerprint": chosen}), console=QUIET)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["teacher"] == newer.teacher_info().fingerprint
    with serve(fake) as server, pytest.raises(Exception, match=r"field=teacher\.fingerprint"):
        train(config_in("pinned", server.address, **steps, teacher={"fingerprint": chosen}), console=QUIET)


def test_a_record_that_was_touched_is_not_believed(config_in, fake, tmp_path):
    keep_record(tmp_path / "cache", fake.teacher_info(), "there:1", pytest.fail)
    (path,) = record_files(records_folder(tmp_path / "cache"))
    record = read_record(path)
    assert record.info == fake.teacher_info() and record.places == ("there:1",)
    keep_record(tmp_path / "cache", fake.teacher_info(), "there:1", pytest.fail)
    assert read_record(path) == record, "nothing is written twice"
    path.write_text(path.read_text().replace('"deterministic": true', '"deterministic": false'))
    assert read_record(path) is None
    with pytest.raises(OfflineError, match="1 records there are damaged"):
        train(config_in("run", "there:1", teacher={"offline": True}), console=QUIET)


def test_teachers_that_do_not_fit_on_the_card_together_are_labelled_in_turn(config_in, fake, model_factory, tmp_path):
    """Each is up alone; the run asks neither, and one of both may be asked while the other is not."""
    other = fake_for(model_factory("qwen2"), hidden_size=16, seed=3)
    steps = {"train": {"max_steps": 2}, "data": {"eval": []}}

    def config(name, near, far, offline):
        each = [("near", near), ("far", far)]
        teachers = [
            {"alias": alias, "address": address, "offline": alias in offline, "when_missing": "reweight"}
            for alias, address in each
        ]
        return config_in(name, None, **steps, teacher=None, teachers=teachers)

    with serve(fake) as server:
        near = server.address
        label(config("run", near, "gone:1", ["far"]), QUIET)
    with serve(other) as server:
        far = server.address
        told = Console(file=io.StringIO(), width=300)
        label(config("run", near, far, ["near"]), told)
        assert "near: offline, and not asked" in told.file.getvalue()
        both = train(config("mixed", near, far, ["near"]), console=QUIET).output_dir
    offline = train(config("run", near, far, ["near", "far"]), console=QUIET).output_dir
    assert adapter_hash(offline) == adapter_hash(both)
    labels_in(tmp_path / "cache")[0].unlink()
    with pytest.raises(OfflineError, match=r"labels of 1 of \d+ .* teachers\.[01]\.offline=false"):
        train(config("again", near, far, ["near", "far"]), console=QUIET)


def test_an_embedded_teacher_is_not_started(config_in, fake, monkeypatch, tmp_path):
    started = []

    @contextlib.contextmanager
    def embedded(path):
        started.append(path)
        with serve(fake) as server:
            yield server.address

    monkeypatch.setattr(connect, "embedded_teacher", embedded)
    teacher = {"embedded": str(tmp_path / "teacher.yaml")}
    sections = {"train": {"max_steps": 1}, "data": {"eval": []}}
    label(config_in("run", None, **sections, teacher=teacher), QUIET)
    result = train(config_in("run", None, **sections, teacher=teacher | {"offline": True}), console=QUIET)
    assert len(started) == 1 and result.usage.teacher_tokens == 0


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"cache": {"labels": False}}, r"cache\.labels"),
        ({"labels": {"transport": "top_k", "k": 8, "extra_ids": 2}}, r"labels\.extra_ids=2"),
        ({"on_policy": {"share": 0.5, "max_new_tokens": 8}}, "on_policy: only a teacher that is up"),
        ({"teacher": {"address": "a:1", "embedded": "b.yaml"}}, "exactly one of address and embedded"),
        ({"teacher": {"fingerprint": "XYZ"}}, r"teacher\.fingerprint"),
    ],
)
def test_what_cannot_be_without_a_teacher_is_refused_by_name(config_in, sections, named):
    teacher = {"offline": True} | sections.pop("teacher", {})
    with pytest.raises(ConfigError, match=named):
        config_in("run", "there:1", teacher=teacher, **sections)


def test_commands_that_need_the_teacher_say_so(config_in, fake, tmp_path):
    keep_record(tmp_path / "cache", fake.teacher_info(), "there:1", pytest.fail)
    with pytest.raises(ConfigError, match="label asks the teacher"):
        label(config_in("run", "there:1", teacher={"offline": True}), QUIET)
    with pytest.raises(ConfigError, match=r"labels\.transport=auto.*name the transport"):
        train(config_in("run", "there:1", teacher={"offline": True}, labels={"transport": "auto"}), console=QUIET)


def test_labels_are_carried_to_another_machine_with_all_that_they_need(config_in, fake, monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["student-trainer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().out

    sections = {"train": {"max_steps": 1}, "data": {"eval": []}}
    with serve(fake) as server:
        label(config_in("run", server.address, **sections), QUIET)
        address = server.address
    here, there = tmp_path / "cache", tmp_path / "usb"
    code, out = call("cache", "export", there, "--cache-dir", here)
    assert code == 0 and "copied with them 1 teacher records, 1 artifacts" in out, out
    code, out = call("cache", "export", there, "--cache-dir", here)
    assert code == 0 and "copied with them" not in out, "what is there stays"
    code, out = call("cache", "stats", "--cache-dir", there)
    assert code == 0 and f"teacher fake (fake) {fake.teacher_info().fingerprint[:16]} met at {address}" in out, out
    assert "with its output head" in out
    result = train(config_in("there", address, "usb", **sections, teacher={"offline": True}), console=QUIET)
    assert result.usage.teacher_tokens == 0 and result.steps == 1
    (record,) = record_files(records_folder(there))
    whole = record.read_text()
    record.write_text(whole[:-20])
    code, out = call("cache", "verify", "--cache-dir", there)
    assert code == 1 and "0 teacher records are whole; 1 were damaged" in out and not record.exists()
    record.write_text(whole)
    code, out = call("cache", "prune", "--older-than-days", "1", "--cache-dir", there)
    assert code == 0 and record.exists(), "its labels are there"
    code, out = call("cache", "prune", "--teacher", fake.teacher_info().fingerprint[:8], "--cache-dir", there)
    assert code == 0 and "1 teachers have no labels left here and are forgotten" in out and not record.exists()
    code, out = call("cache", "verify", "--cache-dir", here)
    assert code == 0 and "1 teacher records are whole; 0 were damaged" in out


def test_the_command_ends_with_one_line(config_in, monkeypatch, capsys, tmp_path, model_factory, rows_file):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path, model_factory("qwen2"), rows_file, "there:1")))
    monkeypatch.setattr(sys, "argv", ["student-trainer", "train", str(path), "teacher.offline=true"])
    with pytest.raises(SystemExit) as end:
        main.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        end.value.code == 2
        and last.startswith("student-trainer: teacher.offline=true: ")
        and "student-trainer label" in last
    )
