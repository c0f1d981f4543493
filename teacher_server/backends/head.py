"""The output head of a folder, alone: what turns states of any engine into labels.

In: states after the final norm and what a student asked for; out: signals on the host. Reads no weight but the head's.
Axes: N wanted rows, C chunk rows, V vocabulary, D width, M named ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor as Torch

from teacher_server.backends.logits import transform_of
from teacher_server.errors import ServerConfigError
from teacher_server.signals import output
from teacher_server.signals.base import Rows
from teacher_server.signals.reduce import OutputHead
from teacher_server.signals.reduce import offered as kinds_offered
from teacher_server.signals.reduce import reduce as reduce_rows
from teacher_server.signals.transfer import ToHost, to_device, to_wire
from teacher_wire.artifacts.kinds.output_head import TeacherHead
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.signals import AnswerShape, SignalSpec, TeacherSignals

_HEAD_NAMES = ("lm_head.weight",)
_TIED_NAMES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Head(OutputHead):
    """An output head that can be given away."""

    def artifact(self) -> Artifact:
        """The whole head on the host, for students; all of it is hashed."""
        weight = to_wire(self.weight_VD.detach().cpu().contiguous())
        bias = None if self.bias_V is None else to_wire(self.bias_V.detach().cpu().contiguous())
        return TeacherHead(weight, bias, self.logit_scale, self.final_softcap).artifact()


def offered(
    head: Head, served: bool, captures: Collection[str] = ()
) -> tuple[tuple[ArtifactInfo, ...], tuple[str, ...]]:
    """What a backend that scores lists in its facts: artifacts, and transports.

    Of these `hidden` needs the head on the other side, and signals of chosen layers what the backend `captures`.
    """
    artifacts = (head.artifact().info,) if served else ()
    return artifacts, kinds_offered(serves_head=served, captures=captures)


def load_head(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Head:
    """The head of a model folder.

    Args:
        folder: with safetensors.
        config: of the model.
        dtype, device: of the head.

    Raises:
        ServerConfigError: the folder holds no head under a known name.
    """
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    files = _files_of_weights(folder)
    names = [name for name in (_TIED_NAMES if tied else _HEAD_NAMES) if name in files]
    if not names:
        wanted = " or ".join(_TIED_NAMES if tied else _HEAD_NAMES)
        raise ServerConfigError(f"model folder {folder} has no output head: no weight called {wanted}")
    weight_VD = _read(files[names[0]], names[0]).to(device=device, dtype=dtype)
    bias_V = None
    if "lm_head.bias" in files:
        bias_V = _read(files["lm_head.bias"], "lm_head.bias").to(device=device, dtype=dtype)
    transform = transform_of(config)
    return Head(weight_VD, bias_V, transform.scale, transform.cap)


def _files_of_weights(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ServerConfigError(f"{file} is no safetensors file: {error}") from error
    return found


def _read(file: Path, name: str) -> Torch:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ServerConfigError(f"{file}: {name} cannot be read: {error}") from error


def reduce(head: Head, hidden_ND: Torch, batch: TokenBatch, spec: SignalSpec, logit_bytes: int) -> TeacherSignals:
    """The signals of one request, without timing and fingerprint.

    Args:
        head: of the model that made the states, on their device.
        hidden_ND: states after the final norm of the wanted rows, in packed order.
        batch: the request's tokens.
        spec: what is asked for.
        logit_bytes: bound on float32 logits held at a time.
    """
    device = hidden_ND.device
    labels_N = to_device(batch.labels_N(), device).long()
    extra_NM = None if batch.extra_ids_NM is None else to_device(batch.extra_ids_NM, device).long()
    checked_N = checked_rows(batch) if spec.check == "sampled" else None
    rows = Rows(hidden_ND, labels_N, extra_NM, batch.sequences_of_rows(), checked_R=checked_N)
    found = ToHost(reduce_rows(head, rows, spec, logit_bytes)).wait()
    types = {part.name: part.dtype for part in spec.fields(AnswerShape(spec.vocab_rows, hidden_ND.shape[1], ""))}
    return TeacherSignals({name: to_wire(part, types[name]) for name, part in found.items()})


def label_logp(head: Head, hidden_ND: Torch, labels_N: Torch, vocab_rows: int, logit_bytes: int) -> Torch:
    """float32 [N] on the states' device: log-probability of each label."""
    pieces = []
    for rows in _chunks(len(hidden_ND), vocab_rows, logit_bytes):
        _, label_C = output.lse_and_label(head.logits(hidden_ND[rows], vocab_rows), labels_N[rows])
        pieces.append(label_C)
    return torch.cat(pieces)


def _chunks(rows: int, vocab_rows: int, logit_bytes: int) -> Iterator[slice]:
    """Slices whose float32 logits stay under a bound."""
    step = max(1, logit_bytes // (4 * vocab_rows))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
