"""Kinds s12 to s15, and the output heads: a cache that others own, that is damaged, that has no home, that must stay small."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from student_trainer.cli import main
from student_trainer.config.run import labels_folder
from student_trainer.errors import ConfigError
from student_trainer.teachers.artifact_cache import fetch_head
from student_trainer.teachers.artifact_files import artifact_files, artifact_folders, make_room
from student_trainer.teachers.offline.record import records_folder
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.teacher_wire.labels.label_writers import SPECS, entry_of, key_of


@pytest.fixture
def call(capsys, monkeypatch):
    """Arguments of `student-trainer cache` -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["student-trainer", "cache", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def cache(tmp_path):
    """A cache folder with five sequences."""
    store = LabelStore(labels_folder(tmp_path / "cache"))
    for seed in range(5):
        entry = entry_of(SPECS["hidden"], seed=seed)
        store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals)
    return tmp_path / "cache"


def labels_of(cache):
    return sorted((cache / "labels").rglob("*.safetensors"))


async def keep_head(cache, seed=0, **options):
    """Fetches the head of the fake of a seed; its file."""
    fake = FakeTeacher(seed=seed)
    with serve(fake) as server:
        async with TeacherClient(server.address) as client:
            await fetch_head(client, await client.teacher(), cache, **options)
    return cache / "heads" / f"{fake.artifacts()[0].header.sha256}.safetensors"


# ------------------------------------------------------------------- folders of others, files that are damaged


def test_what_cannot_be_deleted_is_not_called_deleted(call, cache, monkeypatch):
    labels_of(cache)[1].write_bytes(b"torn")
    labels_of(cache)[3].write_bytes(b"torn")
    refuse = labels_of(cache)[3].name
    unlink = Path.unlink

    def read_only(self, missing_ok=False):
        if self.name == refuse:
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", read_only)
    code, out, _ = call("verify", "--cache-dir", cache)
    assert code == 1 and "2 sequences" in out and "of which 1 could not be deleted" in out, out
    assert "are deleted" not in out and refuse in out and "Permission denied" in out
    assert len(labels_of(cache)) == 4


def test_verify_goes_on_behind_what_it_cannot_read(call, cache, monkeypatch):
    secret = labels_of(cache)[0]
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: _denied(self) if self == secret else read(self))
    code, out, _ = call("verify", "--cache-dir", cache)
    assert code == 1 and "4 sequences" in out and "1 files could not be read" in out and str(secret) in out


def _denied(path):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("teacher", [False, True])
def test_export_goes_on_and_names_the_source(call, cache, tmp_path, monkeypatch, teacher):
    secret = labels_of(cache)[2]
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: _denied(self) if self == secret else read(self))
    entry = entry_of(SPECS["hidden"], seed=0)
    code, out, err = call(
        "export", tmp_path / "usb", "--cache-dir", cache, *(["--teacher", entry.fingerprint[:8]] if teacher else [])
    )
    assert code == 1 and "copied 4 sequences" in out and "1 files could not be read" in out and str(secret) in out, (
        out,
        err,
    )
    assert len(labels_of(tmp_path / "usb")) == 4


def test_export_blames_the_target_when_it_is_the_target(call, cache):
    code, _, err = call("export", "/proc/nowhere", "--cache-dir", cache)
    assert code == 2 and "/proc/nowhere" in err and "cannot be written" in err and len(err.strip().splitlines()) == 1


# ----------------------------------------------------------------------------------------- homes and numbers


def test_no_home_is_one_line(tmp_path):
    code = "import os, sys; os.environ.pop('HOME', None); import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n" \
           "sys.argv = ['student-trainer', 'cache', *sys.argv[1:]]\nfrom student_trainer.cli.main import main\nmain()"  # fmt: skip
    import subprocess
    import sys

    env = {name: value for name, value in os.environ.items() if name != "HOME"}
    for arguments in (["stats"], ["verify"], ["prune", "--max-gb", "1"], ["export", str(tmp_path / "x")]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 2 and "set --cache-dir" in done.stderr and len(done.stderr.splitlines()) == 1, (
            done.stderr
        )
    with_folder = [sys.executable, "-c", code, "stats", "--cache-dir", str(tmp_path)]
    assert subprocess.run(with_folder, capture_output=True, env=env, check=False).returncode == 0


def test_home_unset_for_a_config(monkeypatch):
    monkeypatch.setattr(
        Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(ConfigError, match=r"run\.cache_dir"):
        labels_folder(Path("~/.cache/lyceum"))


@pytest.mark.parametrize(
    "option", [("--max-gb", "inf"), ("--max-gb", "nan"), ("--older-than-days", "inf"), ("--older-than-days", "nan")]
)
def test_numbers_that_are_none(call, cache, option):
    code, _, err = call("prune", *option, "--cache-dir", cache)
    assert code == 2 and len(err.strip().splitlines()) <= 6 and "Traceback" not in err and option[0] in err
    assert len(labels_of(cache)) == 5


# ---------------------------------------------------------------------------------------------- output heads


async def test_stats_and_verify_know_heads(call, cache):
    path = await keep_head(cache)
    code, out, _ = call("stats", "--cache-dir", cache)
    assert code == 0 and "1 output heads" in out
    code, out, _ = call("verify", "--cache-dir", cache)
    assert code == 0 and "1 output heads are whole; 0 were damaged" in out
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    code, out, _ = call("verify", "--cache-dir", cache)
    assert code == 1 and "0 output heads are whole; 1 were damaged" in out and not path.exists()


def test_stats_and_prune_know_tokenised_rows(call, cache):
    entry = Path(cache) / "tokens" / f"{'ab' * 32}.safetensors"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(bytes(1 << 20))
    os.utime(entry, (1, 1))
    code, out, _ = call("stats", "--cache-dir", cache)
    assert code == 0 and "1 tokenised datasets" in out and "1.0 MB" in out
    code, out, _ = call("verify", "--cache-dir", cache)
    assert code == 0 and entry.exists(), "whoever reads it verifies it"
    code, out, _ = call("prune", "--older-than-days", "1", "--cache-dir", cache)
    assert code == 0 and "1 of them tokenised datasets" in out and not entry.exists() and len(labels_of(cache)) == 5


async def test_prune_takes_the_longest_unused_of_both(call, cache):
    old, new = await keep_head(cache, 0), await keep_head(cache, 1)
    os.utime(old, (1, 1))
    code, out, _ = call("prune", "--older-than-days", "1", "--dry-run", "--cache-dir", cache)
    assert code == 0 and "would free" in out and old.exists()
    code, out, _ = call("prune", "--older-than-days", "1", "--cache-dir", cache)
    assert (
        code == 0
        and "1 of them output heads" in out
        and not old.exists()
        and new.exists()
        and len(labels_of(cache)) == 5
    )
    fingerprint = entry_of(SPECS["hidden"], seed=0).fingerprint
    code, _, _ = call("prune", "--teacher", fingerprint[:8], "--cache-dir", cache)
    assert code == 0 and new.exists(), "a head is no one teacher's"
    code, _, _ = call("prune", "--max-gb", "0", "--cache-dir", cache)
    assert code == 0 and not new.exists() and not labels_of(cache)


async def test_heads_stay_below_their_budget(cache):
    told = []
    paths = [await keep_head(cache, seed) for seed in range(3)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (time.time() - 100 * age - 1,) * 2)
    size = paths[0].stat().st_size
    await keep_head(cache, 0, max_bytes=100 * size)  # used again: the newest now
    await keep_head(cache, 3, max_bytes=2 * size + (1 << 16), on_trouble=told.append)
    left = {file.path for file in artifact_files(artifact_folders(cache)["output_head"])}
    assert str(paths[0]) in left and str(paths[1]) not in left and len(left) == 2 and not told
    await keep_head(cache, 4, max_bytes=size, on_trouble=told.append)
    assert "above cache.heads_gb" in told[0] and len(artifact_files(artifact_folders(cache)["output_head"])) == 2
    await keep_head(cache, 5, max_bytes=0, on_trouble=told.append)
    assert len(told) == 1, "0 keeps none, and that is no trouble"


def test_room_is_made_for_what_can_have_it(tmp_path):
    assert not make_room(tmp_path / "none", 10, 9) and make_room(tmp_path / "none", 10, 10)


def test_a_folder_of_heads_with_other_files_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ("a" * 64 + ".1.partial")).write_text("half")
    assert artifact_files(tmp_path) == [] and len(list(tmp_path.iterdir())) == 2
    os.utime(tmp_path / ("a" * 64 + ".1.partial"), (1, 1))
    assert artifact_files(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_command_of_the_cache_says_the_same_as_one_json_object(call, cache, tmp_path):
    """Standard output holds one object and nothing else; exit codes are those without `--json`."""

    def asked(*arguments):
        code, out, _ = call(*arguments, "--cache-dir", cache, "--json")
        (line,) = out.splitlines()
        return code, json.loads(line)

    code, found = asked("stats")
    (shelf,) = found["labels"]
    assert code == 0 and shelf["sequences"] == 5 and shelf["transport"] == "hidden" and found["unreadable_files"] == 0
    assert shelf["bytes"] == sum(path.stat().st_size for path in labels_of(cache)) and found["teachers"] == []
    code, found = asked("export", tmp_path / "other")
    assert code == 0 and found["copied"]["sequences"] == 5 and len(labels_of(tmp_path / "other")) == 5
    labels_of(cache)[0].write_bytes(b"damaged")
    code, found = asked("verify")
    assert code == 1 and (found["whole"]["sequences"], found["damaged"]["sequences"]) == (4, 1)
    code, found = asked("prune", "--max-gb", "0", "--dry-run")
    assert code == 0 and found["dry_run"] and found["freed"]["sequences"] == 4 == len(labels_of(cache))
    code, found = asked("prune", "--max-gb", "0")
    assert code == 0 and not found["dry_run"] and found["freed"]["sequences"] == 4 and not labels_of(cache)
    assert asked("stats")[1]["labels"] == []


def test_a_damaged_record_of_a_teacher_is_told_and_left(call, cache):
    record = records_folder(cache) / "0123456789abcdef-0123456789abcdef.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    code, out, _ = call("stats", "--cache-dir", cache)
    assert code == 0 and "damaged teacher records: 1; `student-trainer cache verify` deletes them" in out
    assert (
        json.loads(call("stats", "--cache-dir", cache, "--json")[1])["damaged_teacher_records"] == 1
        and record.is_file()
    )
