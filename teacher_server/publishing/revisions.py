"""The revisions of one teacher on disk: which are whole, which one is wanted, which go.

In: orders of an edge (this revision is whole, deploy it) and of `up` (it could not come up, delete the oldest); out: folders. The disk is
what edges and `up` share, on one machine or several. Layout of `FOLDER/TEACHER`:

    base/           small files of the model that the config names, and the shapes of its weights (`blueprint`)
    REVISION/       a whole revision, a model folder like any other; made by renaming
    .incoming/      the one that is being received
    wanted.json     revisions in the order in which they were wanted, the newest first, of which model they are revisions, and which one
                    could not come up last
    .lock           held by whoever receives
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from teacher_server.config.publish import PublishConfig
from teacher_server.config.server import TeacherConfig
from teacher_wire.labels.files import replacing, sync
from teacher_wire.publish.messages import SHA256

BASE = "base"
INCOMING = ".incoming"
_WANTED = "wanted.json"
_LOCK = ".lock"
_GOING = ".going-"


class Revisions:
    """The revisions of one teacher.

    Args:
        folder: of this teacher.

    Attributes:
        folder: as given.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, settings: PublishConfig, teacher: str) -> Revisions:
        """Those of a teacher of a server."""
        return cls(settings.folder_of(teacher))

    def path(self, revision: str) -> Path:
        """The folder of a whole revision."""
        assert SHA256.fullmatch(revision), revision
        return self.folder / revision

    def is_whole(self, revision: str) -> bool:
        """Whether it is there: folders get such a name once they are whole."""
        return self.path(revision).is_dir()

    def wanted(self, model: str) -> list[str]:
        """Revisions of that model that were wanted and are there, the newest first; empty where the model itself is.

        A file that is damaged wants nothing: the model of the config then serves.
        """
        try:
            found = json.loads((self.folder / _WANTED).read_text())
            names = found["revisions"] if found["model"] == model else []
            return [name for name in names if SHA256.fullmatch(name) and self.is_whole(name)]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def given_up(self, revision: str) -> str:
        """Why a revision could not come up, if it is the last that could not; else empty."""
        try:
            found = json.loads((self.folder / _WANTED).read_text())["given_up"]
            return str(found["why"]) if found["revision"] == revision else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def want(self, model: str, revision: str) -> None:
        """Makes a whole revision the one that is to serve.

        Raises:
            OSError: the disk does not take it.
        """
        self._write(model, [revision, *(name for name in self.wanted(model) if name != revision)])

    def drop(self, model: str, revision: str, why: str) -> None:
        """No longer wants a revision, which could not come up: the one before is in its place.

        Raises:
            OSError: the disk does not take it.
        """
        given_up = {"revision": revision, "why": why or "no reason is known"}
        self._write(model, [name for name in self.wanted(model) if name != revision], given_up)

    def _write(self, model: str, revisions: list[str], given_up: dict[str, str] | None = None) -> None:
        with replacing(self.folder / _WANTED, shared=True) as partial:
            told = {"model": model, "revisions": revisions, "given_up": given_up}
            partial.write_text(json.dumps(told, indent=1))

    def tidy(self, model: str, keep: int, needed: set[str]) -> list[str]:
        """Deletes all but the newest `keep` revisions and those that are needed.

        An edge that has just found one of them whole and wants it again finds it gone (`wanted`), and has it sent anew.

        Returns:
            The names of the deleted ones.

        Raises:
            OSError: the disk does not take it.
        """
        if not self.folder.is_dir():
            return []
        kept = {*self.wanted(model)[:keep], *needed}
        found = [path for path in self.folder.iterdir() if path.is_dir()]
        old = [path for path in found if SHA256.fullmatch(path.name) and path.name not in kept]
        torn = [path for path in found if path.name.startswith(_GOING)]
        for path in old:
            going = self.folder / f"{_GOING}{path.name}"
            os.replace(path, going)  # from now on it is no revision, however far the deletion comes
            torn.append(going)
        for path in torn:
            shutil.rmtree(path)
        return [path.name for path in old]

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether this block has the lock, which is not waited for. It is released however the process ends.

        Raises:
            OSError: there can be no such file, or its file system knows no locks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)

    def publish(self, staged: Path, revision: str) -> None:
        """Gives a whole folder its name, durably.

        Raises:
            OSError: the disk does not take it.
        """
        for path in [*staged.iterdir(), staged]:
            sync(path)
        os.replace(staged, self.path(revision))
        sync(self.folder)


def model_key(config: TeacherConfig) -> str:
    """What names the model of a config, of which revisions are revisions."""
    backend = config.backend.model_dump()
    return f"{backend.get('model', '')}@{backend.get('revision') or ''}"


def published(config: TeacherConfig) -> TeacherConfig:
    """The teacher with the weights that are wanted: the newest revision of its model, or the model itself."""
    if config.publish is None:
        return config
    wanted = Revisions.of(config.publish, config.name).wanted(model_key(config))
    return with_revision(config, wanted[0] if wanted else "")


def with_revision(config: TeacherConfig, revision: str) -> TeacherConfig:
    """The teacher with the weights of a revision; the empty name is the model of its config."""
    if config.publish is None or not revision:
        return config
    folder = Revisions.of(config.publish, config.name).path(revision)
    backend = config.backend.model_copy(update={"model": str(folder), "revision": None})
    return config.model_copy(update={"backend": backend})


def revision_of(config: TeacherConfig) -> str:
    """The revision that a deployed teacher holds; empty for the model of its config."""
    if config.publish is None:
        return ""
    model = Path(getattr(config.backend, "model", ""))
    found = model.parent == config.publish.folder_of(config.name) and SHA256.fullmatch(model.name)
    return model.name if found else ""
