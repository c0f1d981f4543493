"""A revision that is to be published, as frozen dataclasses: its files by digest, and what they must fit.

Equal files are one revision, whoever sends them: its name is a digest of theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FILES = 999
MAX_CONFIG_BYTES = 1 << 20
MIN_FILE_BYTES = 10  # the shortest safetensors file
FILE_NAME = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class RevisionFile:
    """One file of weights: its name as transformers writes it, its bytes and their SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> RevisionFile:
        """A file on this disk, read once.

        Raises:
            OSError: it cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                size += len(block)
        return cls(path.name, size, digest.hexdigest())


@dataclass(frozen=True)
class Publication:
    """What a PublishOpen says.

    Attributes:
        teacher: its name on the server.
        config_json: config.json of the model, to be compared.
        tokenizer_sha256: of the tokenizer whose ids the weights know, to be compared.
        files: by rising name.
        note: where it comes from, for people.
        timeout_s: of the whole call; 0 for none.
        tenant: who publishes; filled in by the server.
        check_only: nothing is sent, the server only says whether it would be taken.
    """

    teacher: str
    config_json: bytes
    tokenizer_sha256: str
    files: tuple[RevisionFile, ...]
    note: str = ""
    timeout_s: float = 0.0
    tenant: str = ""
    check_only: bool = False

    @property
    def revision(self) -> str:
        """Its name."""
        return revision_of(self.files)

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files)


def revision_of(files: Sequence[RevisionFile]) -> str:
    """The name of the revision of these files (proto: publish)."""
    lines = (f"{file.name} {file.bytes} {file.sha256}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
