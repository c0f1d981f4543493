"""The files of a teacher that a student is made from: its config, its shards, and what is copied byte for byte.

In: a local folder or a hub id; out: `TeacherFiles`. Reads no weight.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.errors import ModelError
from student_trainer.files import read_object

INDEX_NAME, WHOLE_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
# What makes a tokenizer, its templates and how answers are sampled, in every layout that transformers reads.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class TeacherFiles:
    """A teacher on this machine's disk.

    Attributes:
        name: as the user wrote it.
        folder: where its files are.
        config: the object in config.json, as written.
        shards: its safetensors files by name, in their order; empty where weights were not asked for.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]


def find_teacher(name: str, *, weights: bool) -> TeacherFiles:
    """Looks a teacher up; a hub id is fetched, without its weights where these are not needed.

    Raises:
        ModelError: no such folder or repository, no config, no tokenizer, an adapter, a quantised model, or no safetensors.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(f"--from {name}: no such folder")
    else:
        folder = _fetched(name, weights=weights)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"--from {name}: is an adapter, not a whole model; merge it first: student-trainer export {name} OUT"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"--from {name}: has no config.json, so it is no model")
    try:
        config = read_object(folder / CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise ModelError(f"--from {name}: its config.json cannot be read: {error}") from error
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise ModelError(f"--from {name}: has no tokenizer ({', '.join(_TOKENIZERS)})")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise ModelError(
            f"--from {name}: its weights are quantised (quant_method={method}), and a student is trained in floating point; name the "
            "model that it was quantised from"
        )
    return TeacherFiles(name, folder, config, _shards(name, folder) if weights else ())


def copy_beside(teacher: TeacherFiles, target: Path) -> list[str]:
    """Copies tokenizer, templates, generation config and licence byte for byte; returns their names."""
    copied = []
    for file in COPIED:
        if (teacher.folder / file).is_file():
            shutil.copyfile(teacher.folder / file, target / file)
            copied.append(file)
    templates = teacher.folder / _TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, target / _TEMPLATES)
        copied.append(_TEMPLATES)
    return copied


def _fetched(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [CONFIG_NAME, *COPIED, f"{_TEMPLATES}/*", "adapter_config.json"]
    wanted += ["*.safetensors", INDEX_NAME] if weights else []
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"--from {name}: is no folder here, and cannot be fetched from the hub: {str(error)[:300]}"
        ) from error


def _shards(name: str, folder: Path) -> tuple[str, ...]:
    if (folder / INDEX_NAME).is_file():
        try:
            listed = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
            shards = tuple(sorted(set(listed.values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"--from {name}: its {INDEX_NAME} cannot be read: {type(error).__name__}: {error}"
            ) from error
        absent = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
        if absent:
            raise ModelError(f"--from {name}: lacks {len(absent)} of {len(shards)} files of weights, {absent[0]} first")
        return shards
    if (folder / WHOLE_NAME).is_file():
        return (WHOLE_NAME,)
    raise ModelError(
        f"--from {name}: has no safetensors ({WHOLE_NAME} or {INDEX_NAME}); other formats are not read, save it with transformers first"
    )
