"""From a hub id or folder to files on this disk, and the fingerprint of what they hold.

In: what the config says; out: a folder and a digest. It reads safetensors and JSON only: no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teacher_server.errors import ServerConfigError

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# One of these makes a tokenizer; without any, transformers builds an empty one and says nothing.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_READ_BYTES = 8 << 20


def looks_local(model: str) -> bool:
    """Whether a model name means a folder: it exists, or is not of the hub's form `name` or `owner/name`."""
    return Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def check_local(model: str) -> None:
    """Refuses a folder that cannot be a model, before anything is started.

    Raises:
        ServerConfigError: naming folder and file.
    """
    if not looks_local(model):
        return
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ServerConfigError(f"model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ServerConfigError(f"model folder {folder} has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise ServerConfigError(f"model folder {folder} has no *.safetensors")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ServerConfigError(f"model folder {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)})")


def fetch(model: str, revision: str | None) -> Path:
    """The folder of a model, downloaded from the hub if it is a hub id.

    Raises:
        ServerConfigError: the folder is no model, or the hub does not have it.
    """
    check_local(model)
    if looks_local(model):
        return Path(model).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ServerConfigError(
            f"model {model!r} is no local folder and cannot be fetched from the hub: {first}"
        ) from error


def fingerprint(folder: Path, dtype: str) -> str:
    """sha256 over configuration, weights and the dtype they are run in: the teacher's identity."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_file_sha256, files))
    whole = hashlib.sha256(dtype.encode())
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{file.name}\0{digest}\0".encode())
    return whole.hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
