"""A watched config file: changes once, when they are whole; never what cannot be read."""

import itertools
import os

import pytest

from teacher_server.control.config_watch import ConfigFile
from teacher_server.errors import ServerConfigError

TEXT = "teachers: [{name: a, backend: {kind: fake, seed: %s}}]\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(TEXT % 0)
    return file


def write(path, text, ticks=itertools.count(10**18)):  # noqa: B008  one for all: no two writes share a time
    path.write_text(text)
    os.utime(path, ns=(stamp := next(ticks), stamp))


def test_a_change_is_told_once_and_only_when_it_has_been_left_alone(path):
    file = ConfigFile(path, None)
    assert file.poll() is None
    write(path, TEXT % 1)
    assert file.poll() is None, "it may still be being written"
    assert file.poll().teachers[0].backend.seed == 1
    assert file.poll() is None
    write(path, TEXT % 1)
    assert [file.poll(), file.poll()] == [None, None], "touched, not changed"


def test_overrides_stay(path):
    file = ConfigFile(path, ["edge.port=7"])
    write(path, TEXT % 1)
    file.poll()
    found = file.poll()
    assert (found.edge.port, found.teachers[0].backend.seed) == (7, 1)


def test_a_bad_file_is_told_once_and_a_missing_one_waited_for(path):
    file = ConfigFile(path, None)
    write(path, "teachers: [{nmae: a}]")
    file.poll()
    with pytest.raises(ServerConfigError, match=r"nmae.*stays in force"):
        file.poll()
    assert file.poll() is None
    path.unlink()
    assert [file.poll(), file.poll()] == [None, None]
    write(path, TEXT % 2)
    assert [file.poll(), file.poll().teachers[0].backend.seed] == [None, 2]


@pytest.mark.parametrize("way", ["symlink", "symlink of its folder", "rename"])
def test_a_config_swapped_with_equal_size_and_time_is_followed(tmp_path, way):
    """Kind s16: a link turned to another file (Nix, Kubernetes), `rsync -a`: neither size nor time need differ."""
    for seed in (1, 2):
        (tmp_path / f"v{seed}").mkdir()
        (tmp_path / f"v{seed}" / "server.yaml").write_text(TEXT % seed)
        os.utime(tmp_path / f"v{seed}" / "server.yaml", ns=(10**18, 10**18))
    if way == "symlink of its folder":
        link = tmp_path / "current"
        path, targets = link / "server.yaml", ("v1", "v2")
    else:
        link = path = tmp_path / "server.yaml"
        targets = ("v1/server.yaml", "v2/server.yaml")
    if way == "rename":
        (tmp_path / targets[0]).replace(path)
    else:
        link.symlink_to(targets[0])
    file = ConfigFile(path, None)
    assert file.config.teachers[0].backend.seed == 1 and file.poll() is None
    if way == "rename":
        (tmp_path / targets[1]).replace(path)
    else:
        (fresh := tmp_path / "fresh").symlink_to(targets[1])
        fresh.replace(link)
    assert [file.poll(), file.poll().teachers[0].backend.seed] == [None, 2]
