"""The teacher's output head on the student's side: fetched once, kept on disk by its digest, checked on every load.

In: TeacherInfo and a client; out: tensors in the teacher's dtype. The file is safetensors; a damaged one is fetched again. The longest
unused go when the folder would grow above its budget.
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
from student_trainer.labels.device_transfer import to_torch
from student_trainer.teachers.head_files import heads_folder, make_room
from teacher_wire.core.identity import head_sha256
from teacher_wire.core.info import HeadHeader, TeacherHead, TeacherInfo
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.files import replacing

log = logging.getLogger(__name__)


async def fetch_head(
    client: TeacherClient,
    info: TeacherInfo,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
    on_trouble: Callable[[str], None] = log.warning,
    max_bytes: int | None = None,
) -> TeacherHead:
    """The head of a teacher, from disk if it is there.

    Args:
        client: of its server.
        info: the teacher.
        cache_dir: shared by all runs of this machine.
        progress: told the bytes that came and the bytes in all.
        on_trouble: told in a sentence if the head cannot be kept; it is given back all the same.
        max_bytes: budget of the folder of heads; None for no limit.

    Raises:
        LabelError: what came is not what the teacher described.
        CapabilityError: the teacher does not give its head away.
    """
    path = heads_folder(cache_folder(cache_dir)) / f"{info.head_sha256}.safetensors"
    if path.is_file():
        cached = read_head(path)
        if cached is not None and cached.header.sha256 == info.head_sha256:
            with contextlib.suppress(OSError):  # a disk that is only read
                os.utime(path)
            return cached
    head = await client.head(info, progress)
    try:
        size = head.header.weight_bytes + (1 << 16)
        if max_bytes is not None and not make_room(path.parent, size, max_bytes):
            if max_bytes:
                on_trouble(
                    f"{path.parent}: the teacher's output head ({size / 2**30:.2f} GB) is above cache.heads_gb={max_bytes / 2**30:g}; "
                    "it is not kept"
                )
            return head
        _write(path, head)
    except (OSError, SafetensorError) as error:
        on_trouble(f"{path.parent}: {error}; the teacher's output head is not kept")
    return head


def _write(path: Path, head: TeacherHead) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = head.header
    tensors = {"weight": to_torch(head.weight_VD)}
    if header.bias_V is not None:
        tensors["bias"] = to_torch(header.bias_V)
    scales = {"logit_scale": header.logit_scale, "final_softcap": header.final_softcap}
    with replacing(path, durable=False, shared=True) as partial:
        save_file(tensors, str(partial), metadata={"scales": json.dumps(scales)})


def read_head(path: Path) -> TeacherHead | None:
    """The head in a file, with the digest of what is really in it; None if it cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            scales = json.loads(file.metadata()["scales"])
            weight = _to_wire(file.get_tensor("weight"))
            bias = _to_wire(file.get_tensor("bias")) if "bias" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None
    scale, softcap = float(scales["logit_scale"]), float(scales["final_softcap"])
    rows, columns = weight.shape
    digest = head_sha256(weight, bias, scale, softcap)
    return TeacherHead(HeadHeader(weight.dtype, rows, columns, bias, scale, softcap, digest), weight)


def _to_wire(tensor: torch.Tensor) -> Tensor:
    if tensor.dtype == torch.bfloat16:
        return Tensor("bfloat16", tensor.view(torch.int16).numpy().view(np.uint16))
    return Tensor(str(tensor.dtype).removeprefix("torch."), tensor.numpy())
