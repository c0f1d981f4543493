"""Labels of one sequence out of random bits, in every form in which they travel; for the tests of the label store."""

from __future__ import annotations

import numpy as np

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import SignalSpec, TeacherSignals, blocks_of, outliers_of
from teacher_wire.core.tensor import DTYPES, Tensor, token_id_dtype
from teacher_wire.labels.blob import LabelEntry, label_keys

WIDTH = 40
SPECS = {
    "hidden": SignalSpec("hidden", 300),
    "int8": SignalSpec("hidden", 300, compression="int8"),
    "full": SignalSpec("full", 30),
    "top_k": SignalSpec("top_k", 300, k=5),
    "top_k_24": SignalSpec("top_k", 70_000, k=5),
    "named": SignalSpec("top_k", 70_000, k=4, extra=3),
}


def entry_of(
    spec: SignalSpec, *, seed: int = 0, tokens: int = 6, dtype: str = "float32", fingerprint: str = "f" * 64
) -> LabelEntry:
    """Random labels of a random sequence; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    wanted = rng.random(tokens) < 0.6
    wanted[0], wanted[-1] = True, False
    rows = int(wanted.sum())
    extra = rng.permuted(np.tile(np.arange(spec.extra + 4, dtype=np.int32), (rows, 1)), axis=1)[:, : spec.extra]
    ids = rng.integers(0, spec.vocab_rows, tokens).astype(np.int32)
    batch = TokenBatch(ids, np.array([0, tokens], np.int32), wanted, extra if spec.extra else None)

    def some(wire: str, *shape: int, top: int | None = None) -> Tensor:
        numpy_dtype = np.dtype(DTYPES[wire][0])
        if top is not None:
            return Tensor(wire, rng.integers(0, top, (rows, *shape)).astype(numpy_dtype))
        bits = rng.integers(0, 256, (rows, *shape, numpy_dtype.itemsize), dtype=np.uint8)
        return Tensor(wire, bits.view(numpy_dtype)[..., 0])  # any bits, NaN and infinity among them

    tensors = {"lse_N": some("float32"), "label_logp_N": some("float32")}
    if spec.compression == "int8":
        tensors["state_int8_ND"] = some("int8", WIDTH)
        tensors["state_scales_NG"] = some("float16", blocks_of(WIDTH))
        tensors["outlier_ids_NO"] = some("uint16", outliers_of(WIDTH))
        tensors["outlier_values_NO"] = some("bfloat16", outliers_of(WIDTH))
    elif spec.transport == "hidden":
        tensors["hidden_ND"] = some(dtype, WIDTH)
    elif spec.transport == "full":
        tensors["logits_NV"] = some(dtype, spec.vocab_rows)
    else:
        tensors["topk_ids_NK"] = some(token_id_dtype(spec.vocab_rows), spec.kept, top=spec.vocab_rows)
        tensors["topk_logits_NK"] = some(dtype, spec.kept)
        tensors["tail_logp_N"] = some("float32")
    return LabelEntry(fingerprint, spec, batch, TeacherSignals.of(tensors, fingerprint))


def key_of(entry: LabelEntry) -> str:
    return label_keys(entry.fingerprint, entry.spec, entry.sequence)[0]


def assert_same_labels(found: TeacherSignals, expected: TeacherSignals) -> None:
    """Bit for bit, whatever the bits mean."""
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        other = found.tensors()[name]
        assert (other.dtype, other.shape, other.array.dtype) == (tensor.dtype, tensor.shape, tensor.array.dtype), name
        assert other.array.tobytes() == tensor.array.tobytes(), name
    assert found.fingerprint == expected.fingerprint
