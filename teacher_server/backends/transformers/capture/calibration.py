"""The basis of a teacher's layers: computed once of a sample, and kept on disk under what it was computed of.

In: a body and the section `features`; out: a `LayerBasis`. Axes: R rank, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from teacher_server.backends.base import ModelFacts
from teacher_server.backends.transformers.capture import sample
from teacher_server.backends.transformers.capture.probe import Capturing
from teacher_server.config.features import FeaturesConfig
from teacher_server.errors import ServerConfigError
from teacher_server.signals.captured import Wish
from teacher_server.signals.features.calibration import calibrate
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis, OneLayer
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.tensor import Tensor as WireTensor
from teacher_wire.score.signals.attention import SINK_POSITIONS

log = logging.getLogger(__name__)

_FORMAT = "lyceum-layer-basis/1"  # changes with whatever changes a basis of the same sample
_SEQUENCES = 8  # of one pass


def calibrated(
    features: FeaturesConfig, facts: ModelFacts, body: Capturing, tokenizer: Any
) -> tuple[Artifact, ModelFacts]:
    """What the states of a loaded model are projected on, and its facts with that.

    Raises:
        ServerConfigError: the model hands no states over, has no such layer, or the sample is none.
    """
    basis = basis_of(features, facts, body, tokenizer)
    artifact = basis.artifact()
    artifacts = (*facts.artifacts, artifact.info)
    return artifact, replace(facts, artifacts=artifacts, basis_rank=basis.rank, basis_layers=tuple(basis.layers))


@torch.inference_mode()
def basis_of(features: FeaturesConfig, facts: ModelFacts, body: Capturing, tokenizer: Any) -> LayerBasis:
    """What the states of a loaded model are projected on; from disk, if it was kept there.

    Raises:
        ServerConfigError: the model hands no states over, has no such layer, or the sample is none.
    """
    if "layers" not in facts.transports:
        raise ServerConfigError(f"features: model {facts.model!r} gives no states of its layers (the log says why)")
    layers = features.chosen(facts.layers)
    if layers[-1] > facts.layers:
        raise ServerConfigError(
            f"features.layers: model {facts.model!r} has no layer {layers[-1]}, only 0..{facts.layers}"
        )
    rank = min(features.rank, facts.hidden_size)
    if rank < features.rank:
        log.info("features.rank %d: model %s is %d wide", features.rank, facts.model, rank)
    sequences = sample.token_ids(features, tokenizer, facts.vocab_rows, facts.max_sequence_tokens)
    asked = json.dumps([_FORMAT, facts.fingerprint, sample.sha256(sequences), layers, rank])
    folder = features.folder.expanduser() if features.folder is not None else None
    file = folder and folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.safetensors"
    kept = _read(file) if file else None
    if kept is not None:
        return kept
    started = time.monotonic()

    def states(wanted: Sequence[int]) -> Iterator[Mapping[int, Tensor]]:
        for start in range(0, len(sequences), _SEQUENCES):
            group = sequences[start : start + _SEQUENCES]
            rows = [np.arange(SINK_POSITIONS, len(ids)) for ids in group]
            yield body.run(group, rows, Wish(states=tuple(wanted)))[1].states

    basis = calibrate(states, layers, facts.hidden_size, rank)
    log.info("model %s: a basis of %d layers in %.1f s", facts.model, len(layers), time.monotonic() - started)
    return _keep(file, basis) if file else basis


def _read(file: Path) -> LayerBasis | None:
    """A basis that was kept, with the bits that it had; None if there is none."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("features.folder: %s is not read: %s", file, error.strerror)
        return None
    digest, data = data[:64].decode("ascii", "replace"), data[64:]
    try:
        if digest != hashlib.sha256(data).hexdigest():
            raise ValueError("another digest than its content has")
        arrays = load(data)
        numbers = sorted(int(name[len("mean") : -len("_D")]) for name in arrays if name.startswith("mean"))
        return LayerBasis({number: _layer(arrays, number) for number in numbers})
    except (SafetensorError, ValueError, KeyError) as error:
        log.warning("features.folder: %s is damaged (%s) and made again", file, error)
        file.unlink(missing_ok=True)
        return None


def _layer(arrays: Mapping[str, np.ndarray], number: int) -> OneLayer:
    return OneLayer(
        WireTensor("float32", arrays[f"mean{number}_D"]),
        WireTensor("float16", arrays[f"basis{number}_DR"]),
        WireTensor("int32", arrays[f"massive{number}_M"]),
    )


def _keep(file: Path, basis: LayerBasis) -> LayerBasis:
    """Writes a basis; if another process was first, that one's, so that both serve the same."""
    data = save({name: tensor.array for name, tensor in basis.artifact().tensors.items()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".unfinished-", delete=False) as written:
            written.write(hashlib.sha256(data).hexdigest().encode() + data)
            written.flush()
            os.fsync(written.fileno())
        try:
            os.link(written.name, file)
        except FileExistsError:
            return _read(file) or basis
        finally:
            os.unlink(written.name)
    except OSError as error:
        log.warning("features.folder: the basis is not kept in %s: %s", file.parent, error.strerror)
    return basis
