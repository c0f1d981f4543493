"""A teacher's artifacts on the student's side: fetched once, kept on disk by kind and digest, checked on every load.

In: TeacherInfo and a client; out: tensors in the teacher's dtype. The file is safetensors; a damaged one is fetched again. The longest
unused go when the artifacts would grow above their budget.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from student_trainer.config.run import cache_folder
from student_trainer.teachers.artifact_files import artifact_folders, make_room
from teacher_wire.artifacts.kinds import KINDS, kind_of
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD, TeacherHead
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.files import replacing

log = logging.getLogger(__name__)

_FILE_OVERHEAD_BYTES = 1 << 16


async def fetch_head(
    client: TeacherClient,
    info: TeacherInfo,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
    on_trouble: Callable[[str], None] = log.warning,
    max_bytes: int | None = None,
) -> TeacherHead:
    """The output head of a teacher; see `fetch_artifact`."""
    wanted = info.artifact(OUTPUT_HEAD)
    return TeacherHead.of(await fetch_artifact(client, info, wanted, cache_dir, progress, on_trouble, max_bytes))


async def fetch_artifact(
    client: TeacherClient,
    info: TeacherInfo,
    wanted: ArtifactInfo,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
    on_trouble: Callable[[str], None] = log.warning,
    max_bytes: int | None = None,
) -> Artifact:
    """An artifact of a teacher, from disk if it is there.

    Args:
        client: of its server.
        info: the teacher.
        wanted: one of `info.artifacts`.
        cache_dir: shared by all runs of this machine.
        progress: called with the bytes that came and the bytes in all.
        on_trouble: called with a sentence if the artifact cannot be kept; it is given back all the same.
        max_bytes: budget of all artifacts on disk; None for no limit.

    Raises:
        LabelError: what came is not what the teacher described.
        CapabilityError: the teacher does not give it away, or this side does not know its kind.
    """
    kind_of(wanted.kind)
    cache = cache_folder(cache_dir)
    path = artifact_folders(cache)[wanted.kind] / f"{wanted.sha256}.safetensors"
    if path.is_file():
        cached = read_artifact(path)
        if cached is not None and cached.info == wanted:
            with contextlib.suppress(OSError):  # a disk that is only read
                os.utime(path)
            return cached
    artifact, what = await client.artifact(info, wanted, progress), wanted.kind.replace("_", " ")
    try:
        size = wanted.bytes + _FILE_OVERHEAD_BYTES
        if max_bytes is not None and not make_room(cache, size, max_bytes):
            if max_bytes:
                on_trouble(
                    f"{path.parent}: the teacher's {what} ({size / 2**30:.2f} GB) is above cache.heads_gb={max_bytes / 2**30:g}; "
                    "it is not kept"
                )
            return artifact
        _write(path, artifact)
    except (OSError, SafetensorError) as error:
        on_trouble(f"{path.parent}: {error}; the teacher's {what} is not kept")
    return artifact


def _write(path: Path, artifact: Artifact) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: _to_file(tensor) for name, tensor in artifact.tensors.items()}
    about = {"kind": artifact.header.kind, "tensors": list(tensors), "numbers": dict(artifact.numbers)}
    with replacing(path, durable=False, shared=True) as partial:
        save_file(tensors, str(partial), metadata={"artifact": json.dumps(about)})


def read_artifact(path: Path) -> Artifact | None:
    """The artifact in a file, with the digest of what is really in it; None if it cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads(file.metadata()["artifact"])
            tensors = {name: _to_wire(file.get_tensor(name)) for name in about["tensors"]}
        numbers = {str(name): float(value) for name, value in about["numbers"].items()}
        return KINDS[about["kind"]].make(tensors, numbers)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _to_file(tensor: Tensor) -> torch.Tensor:
    """The same bytes under the dtype of the file; `labels.device_transfer.to_torch` would widen ids."""
    array = np.ascontiguousarray(tensor.array)
    found = torch.from_numpy(array if array.flags.writeable else array.copy())
    return found.view(torch.bfloat16) if tensor.dtype == "bfloat16" else found


def _to_wire(tensor: torch.Tensor) -> Tensor:
    if tensor.dtype == torch.bfloat16:
        return Tensor("bfloat16", tensor.view(torch.int16).numpy().view(np.uint16))
    return Tensor(str(tensor.dtype).removeprefix("torch."), tensor.numpy())
