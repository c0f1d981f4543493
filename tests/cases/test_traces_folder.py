"""Kinds s20, s21, s22: the output folder of traces: a user's own files, the same job twice, a full disk, torn files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from student_trainer.errors import ConfigError, RunError, StudentError
from student_trainer.traces.folder import TracesFolder
from student_trainer.traces.questions import Question
from student_trainer.traces.selection import Judgement
from tests.cases.material import command
from tests.student_trainer.traces.test_traces_run import QUESTIONS, run, world  # noqa: F401
from tests.students import run_student
from tests.teacher_wire.labels.test_store_processes import small_disk

IDENTITY = {"teacher": "a" * 64, "sampling": {"samples": 1}}


def judgement(number):
    return Judgement(Question((), f"gold {number}", f"rows.jsonl:{number}"), (), None)


def folder_of(path, resume=False, **changes):
    return TracesFolder(path, IDENTITY | changes, resume=resume)


# -------------------------------------------------------------------------------------- a user's own files


@pytest.mark.parametrize(
    "name", ["traces.jsonl", "quarantine.jsonl", "progress.jsonl", "stats.json", "notes.txt", "sub"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(tmp_path, name, resume):
    file = tmp_path / "out" / name
    file.parent.mkdir()
    file.mkdir() if name == "sub" else file.write_text('{"mine": 1}\n' * 50)
    with pytest.raises(ConfigError, match=f"holds {name} and no run"):
        folder_of(file.parent, resume=resume)
    assert [path.name for path in file.parent.iterdir()] == [name]
    assert name == "sub" or file.read_text() == '{"mine": 1}\n' * 50


@pytest.mark.parametrize("resume", [False, True])
def test_the_case_itself(world, resume):  # noqa: F811
    world.folder.mkdir()
    mine = world.folder / "traces.jsonl"
    mine.write_text('{"mine": 1}\n' * 50)
    with pytest.raises(ConfigError, match="choose another folder"):
        run(world, resume=resume)
    assert mine.read_text() == '{"mine": 1}\n' * 50 and world.writer.written == 0


def test_an_empty_folder_and_one_of_a_start_that_was_killed_are_ours(tmp_path):
    for leftovers in ((), ("run.json.partial", "run.lock")):
        out = tmp_path / f"out{len(leftovers)}"
        out.mkdir()
        for name in leftovers:
            (out / name).write_text("half")
        folder_of(out, resume=bool(leftovers)).close()
        assert (out / "run.json").is_file()


# --------------------------------------------------------------------------------------- the same job twice


def test_the_second_of_two_is_refused_and_names_the_holder(tmp_path):
    first = folder_of(tmp_path / "out")
    first.add(judgement(1), 0.1)
    for resume in (True, False):
        with pytest.raises(StudentError) as caught:
            folder_of(tmp_path / "out", resume=resume)
        assert not resume or f"process {os.getpid()}" in str(caught.value)
    first.add(judgement(2), 0.1)
    first.close()
    second = folder_of(tmp_path / "out", resume=True)
    assert second.done == 2
    second.close()
    assert len((tmp_path / "out" / "traces.jsonl").read_text().splitlines()) == 2


def test_another_process_is_refused_too(world, tmp_path):  # noqa: F811
    import yaml

    run(world)
    file = tmp_path / "traces.yaml"
    file.write_text(yaml.safe_dump(world.config().model_dump(mode="json")))
    identity = json.loads((world.folder / "run.json").read_text())
    held = TracesFolder(world.folder, identity, resume=True)
    done = command("traces", file, "--resume", "auto", cwd=tmp_path)
    assert done.returncode == 2 and f"process {os.getpid()}" in done.stderr.splitlines()[-1], done.stderr
    held.close()
    assert run_student("traces", file, "--resume", "auto", cwd=tmp_path).returncode == 0


def test_a_refusal_gives_the_lock_back(tmp_path):
    folder_of(tmp_path / "out").close()
    with pytest.raises(
        RunError, match=r"output_dir .*/out: the run in it was started with something else \(teacher: .* -> bbb"
    ):
        folder_of(tmp_path / "out", resume=True, teacher="b" * 64)
    folder_of(tmp_path / "out", resume=True).close()


# ---------------------------------------------------------------------------------- full disks and torn files


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"teacher": ', b"[]", b"null", b"\xff\xfe"])
def test_a_torn_identity_is_one_line(tmp_path, content):
    folder_of(tmp_path / "out").close()
    (tmp_path / "out" / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: .*start another one"):
        folder_of(tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    "line",
    [
        b"\0\0\0\n",
        b"{}\n",
        b"[]\n",
        b'{"stats": {"colour": 1}, "bytes": {}}\n',
        b'{"stats": {}, "bytes": {"traces.jsonl": "x"}}\n',
    ],
)
def test_damaged_progress_is_one_line(tmp_path, line):
    folder = folder_of(tmp_path / "out")
    folder.add(judgement(1), 0.1)
    folder.close()
    progress = tmp_path / "out" / "progress.jsonl"
    progress.write_bytes(line + progress.read_bytes())
    with pytest.raises(RunError, match=r"progress\.jsonl:1: damaged"):
        folder_of(tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "traces.jsonl").read_text().count("\n") == 1, "nothing is cut off meanwhile"


class NearlyFull:
    """A file of a disk that takes some bytes more."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = min(len(data), self._room)
        self._room -= part
        return self._file.write(data[:part])

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("name", ["traces.jsonl", "progress.jsonl"])
def test_a_full_disk_is_one_line_and_what_is_done_stays_done(tmp_path, name):
    folder = folder_of(tmp_path / "out")
    folder.add(judgement(1), 0.1)
    folder._files._files[name] = NearlyFull(folder._files._files[name], 10)
    with pytest.raises(
        RunError, match=rf"{name}: cannot be written: No space left on device; 1 questions are done.*--resume"
    ):
        folder.add(judgement(2), 0.1)
    folder.close()  # complains no second time
    again = folder_of(tmp_path / "out", resume=True)
    assert again.done == 1
    again.add(judgement(2), 0.1)
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "out" / "traces.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_a_real_full_disk(world, tmp_path):  # noqa: F811
    with small_disk(tmp_path / "disk", "16k") as disk, pytest.raises(StudentError, match="No space left on device"):
        run(world, output_dir=str(disk / "out"))
    assert run(world).stats.questions == QUESTIONS


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for where, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "cannot be written"),
        ("/proc/out", "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=said):
            folder_of(Path(where))


def test_home_is_home(world, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert world.config(output_dir="~/traces").output_dir == tmp_path / "home" / "traces"
