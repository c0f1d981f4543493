"""The one writer: a file is there whole or not at all, and nothing is left beside it."""

import errno
import os

import pytest

from teacher_wire.labels import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_file_is_replaced_whole(tmp_path, durable, shared):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.replacing(path, durable=durable, shared=shared) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.name.endswith(files.PARTIAL)
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write():
        with files.replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_disk_that_fails_at_the_sync_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fails(handle):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="broken"), files.replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_processes_that_share_a_file_write_to_names_of_their_own(tmp_path):
    path = tmp_path / "a.safetensors"
    with files.replacing(path, shared=True) as one, files.replacing(path, shared=True) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1" and names(tmp_path) == ["a.safetensors"], "the last to end stays"


@pytest.mark.parametrize("refusal", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_the_first_writer_wins(tmp_path, monkeypatch, refusal):
    if refusal is not None:

        def without_links(*args):
            raise OSError(refusal, "no links here")

        monkeypatch.setattr(os, "link", without_links)
    path = tmp_path / "ab" / "key.safetensors"
    assert files.write_first(path, b"one") and not files.write_first(path, b"two")
    assert path.read_bytes() == b"one" and names(path.parent) == [path.name]


def test_other_troubles_of_a_link_are_not_hidden(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(OSError, match="broken"):
        files.write_first(tmp_path / "key", b"one")
    assert names(tmp_path) == []
