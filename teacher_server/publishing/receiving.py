"""One revision while it is received: files that grow in a folder of their own, then a check of the whole.

In: pieces in order; out: a whole revision under its name, or a refusal, of which nothing is left. Blocking: whoever calls it does so in
a thread. A call that breaks leaves what came, for the next one of the same revision.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from teacher_server.backends.weight_files import outline_of
from teacher_server.config.publish import PublishConfig
from teacher_server.errors import ServerConfigError
from teacher_server.publishing.blueprint import Blueprint
from teacher_server.publishing.revisions import INCOMING, Revisions
from teacher_wire.core.errors import OverloadedError, RequestError
from teacher_wire.publish.messages import Publication

_TOLD = "lyceum-revision.json"
_READ_BYTES = 4 << 20
_HEADER_BYTES = 32 << 20  # of one file: a million characters are some ten thousand tensors
_ROOM_BYTES = 64 << 20  # that stay free on the disk
_RETRY_S = 30.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Receiving:
    """A revision that is being received; the lock of its teacher must be held.

    Args:
        publication: what was announced.
        revisions: of the teacher.
        blueprint: what it must fit.
        settings: of the teacher.

    Attributes:
        have: bytes of each file that are there, from a call before.

    Raises:
        OverloadedError: no room on the disk.
    """

    def __init__(
        self, publication: Publication, revisions: Revisions, blueprint: Blueprint, settings: PublishConfig
    ) -> None:
        self._publication = publication
        self._revisions = revisions
        self._blueprint = blueprint
        self._folder = revisions.folder / INCOMING
        self._file: BinaryIO | None = None
        self._number = -1
        self.have: tuple[int, ...] = tuple(file.bytes for file in publication.files)
        if not revisions.is_whole(publication.revision):
            with _disk_trouble(settings.folder):
                self.have = self._take_up()
                self._check_room()

    def _take_up(self) -> tuple[int, ...]:
        """What is there of the same revision; anything else is deleted."""
        told = self._folder / _TOLD
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(told.read_text()).get("revision") == self._publication.revision:
                return tuple(self._grown(file.name, file.bytes) for file in self._publication.files)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        said = {
            "revision": self._publication.revision,
            "tenant": self._publication.tenant,
            "note": self._publication.note,
        }
        told.write_text(json.dumps(said, indent=1))
        return (0,) * len(self._publication.files)

    def _grown(self, name: str, size: int) -> int:
        path = self._folder / name
        return min(size, path.stat().st_size) if path.is_file() else 0

    def _check_room(self) -> None:
        missing = self._publication.bytes - sum(self.have)
        free = shutil.disk_usage(self._folder).free
        if missing + _ROOM_BYTES > free:
            raise OverloadedError(
                "no room on the server's disk",
                field="publish.folder",
                value=missing,
                limit=free,
                retry_after_s=_RETRY_S,
            )

    def write(self, number: int, data: bytes) -> None:
        """Adds to a file; files come in order.

        Raises:
            OverloadedError: the disk is full; what came is deleted, so that others have room.
        """
        with _disk_trouble(self._folder, self.discard):
            if number != self._number:
                self._close()
                self._number = number
                self._file = self._path(number).open("ab")
                self._file.truncate(self.have[number])
            assert self._file is not None
            self._file.write(data)

    def finish(self) -> None:
        """Checks the whole and gives it its name.

        Raises:
            RequestError, MismatchError: it is not what was announced, or does not fit; it is deleted.
            OverloadedError: the disk is full; it is deleted.
        """
        self._close()
        if self._revisions.is_whole(self._publication.revision):
            return
        try:
            with _disk_trouble(self._folder):
                for number, file in enumerate(self._publication.files):
                    if _sha256(self._path(number)) != file.sha256:
                        raise RequestError(
                            "not the bytes that were announced", field=f"files.{number}.sha256", value=file.name
                        )
                outlines = {file.name: self._outline(number) for number, file in enumerate(self._publication.files)}
                where = self._blueprint.check_weights(outlines)
                self._blueprint.complete(self._folder, where, self._publication.bytes)
                self._revisions.publish(self._folder, self._publication.revision)
        except BaseException:
            self.discard()
            raise

    def _outline(self, number: int) -> Any:
        file = self._publication.files[number]
        try:
            return outline_of(self._path(number), _HEADER_BYTES)
        except ServerConfigError as error:
            told = str(error).replace(str(self._folder) + os.sep, "")
            raise RequestError(told, field=f"files.{number}", value=file.name) from None

    def discard(self) -> None:
        """Deletes what has come."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the file; what came stays."""
        with contextlib.suppress(OSError):
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _path(self, number: int) -> Path:
        return self._folder / self._publication.files[number].name


@contextlib.contextmanager
def _disk_trouble(folder: Path, discard: Any = lambda: None) -> Iterator[None]:
    """A disk that is full is no fault of the publisher, and may pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        discard()
        raise OverloadedError(
            f"no room on the server's disk: {error.strerror}",
            field="publish.folder",
            value=folder.name,
            retry_after_s=_RETRY_S,
        ) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
