"""From a hub id or folder to files on this disk, and the fingerprint of what they hold.

In: what the config says; out: folders and a digest. It reads safetensors and JSON only: no pickle, no remote code. A model may be an
adapter's folder, which names its base. What a folder lacks, and a file that was cut short, is found without loading anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from teacher_server.backends.weight_files import check_file
from teacher_server.errors import ServerConfigError

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# One of these makes a tokenizer; without any, transformers builds an empty one and says nothing.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are on this disk.

    Attributes:
        folder: config and weights; for an adapter those of its base.
        tokenizer: folder of the tokenizer.
        adapter: folder of the adapter that belongs on top; None for a whole model.
    """

    folder: Path
    tokenizer: Path
    adapter: Path | None = None


def looks_local(model: str) -> bool:
    """Whether a model name means a folder: it exists, or is not of the hub's form `name` or `owner/name`."""
    return Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def check_local(model: str) -> None:
    """Refuses a folder that cannot be a model, before anything is started; of an adapter its base too.

    Raises:
        ServerConfigError: naming folder and file.
    """
    if not looks_local(model):
        return
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ServerConfigError(f"model folder {folder} does not exist")
    if not (folder / ADAPTER_CONFIG).is_file():
        _check_whole(folder)
        return
    check_file(folder / ADAPTER_WEIGHTS)
    base = base_of(folder)
    if looks_local(base):
        at = _base_folder(folder, base)
        try:
            _check_whole(at, needs_tokenizer=not _has_tokenizer(folder))
        except ServerConfigError as error:
            raise ServerConfigError(f"model folder {folder} is an adapter of {base}: {error}") from None


def _check_whole(folder: Path, *, needs_tokenizer: bool = True) -> None:
    if not (folder / "config.json").is_file():
        raise ServerConfigError(f"model folder {folder} has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise ServerConfigError(f"model folder {folder} has no *.safetensors")
    if needs_tokenizer and not _has_tokenizer(folder):
        raise ServerConfigError(f"model folder {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    for name in ("config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    files = {whole} if whole.is_file() else set(folder.glob("*.safetensors"))
    if index.is_file() and not whole.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise ServerConfigError(f"{index} has no weight_map")
        files = {folder / str(name) for name in named.values()}
    for file in sorted(files):
        check_file(file)


def architectures(model: str) -> list[str]:
    """The classes that a local folder's config.json names; none if it names none, is an adapter's or is not here."""
    file = Path(model).expanduser() / "config.json"
    if not looks_local(model) or not file.is_file():
        return []
    named = _read_json(file).get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def base_of(folder: Path) -> str:
    """The base model that an adapter's folder names.

    Raises:
        ServerConfigError: it names none, or holds another kind of adapter.
    """
    settings = _read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ServerConfigError(
            f"model folder {folder} holds adapters of kind {settings.get('peft_type')}; LORA alone is supported"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ServerConfigError(
            f"model folder {folder} is an adapter that names no base model (base_model_name_or_path)"
        )
    return base


def _base_folder(folder: Path, base: str) -> Path:
    """Where a local base is: as its name says from here, or from the adapter."""
    at = next((path for path in (Path(base).expanduser(), folder / base) if path.is_dir()), None)
    if at is None:
        raise ServerConfigError(
            f"model folder {folder} is an adapter of {base!r}, and there is no such folder; put the base model there, or write where it is "
            f"into base_model_name_or_path of {folder / ADAPTER_CONFIG}"
        )
    if (at / ADAPTER_CONFIG).is_file():
        raise ServerConfigError(
            f"model folder {folder} is an adapter of {at}, which is an adapter too; merge that one first"
        )
    return at


def _read_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ServerConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ServerConfigError(f"{file} holds no JSON object")
    return found


@contextlib.contextmanager
def refusals_of(model: str) -> Iterator[None]:
    """Turns what transformers raises while it loads a model into one line.

    Raises:
        ServerConfigError: naming the model.
    """
    try:
        yield
    except ServerConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ServerConfigError(f"model {model!r} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def find(model: str, revision: str | None) -> ModelFiles:
    """The parts of a model or an adapter, downloaded from the hub as far as they are hub ids.

    Raises:
        ServerConfigError: a folder is no model, or the hub does not have it.
    """
    folder = fetch(model, revision)
    if not (folder / ADAPTER_CONFIG).is_file():
        return ModelFiles(folder, folder)
    base = base_of(folder)
    try:
        at = _base_folder(folder, base) if looks_local(base) else fetch(base, None)
    except ServerConfigError as error:
        raise ServerConfigError(f"model {model!r} is an adapter of {base!r}: {error}") from error
    return ModelFiles(at, folder if _has_tokenizer(folder) else at, folder)


def fetch(model: str, revision: str | None) -> Path:
    """The folder of a model or adapter, downloaded from the hub if it is a hub id.

    Raises:
        ServerConfigError: the folder is none, or the hub does not have it.
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


def fingerprint(folder: Path, dtype: str, adapter: Path | None = None) -> str:
    """sha256 over configuration, weights and the dtype they are run in, and those of an adapter: the teacher's identity."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    files += [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS] if adapter else []
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
