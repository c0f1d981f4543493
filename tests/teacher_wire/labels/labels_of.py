"""Labels of one sequence out of random bits, in every form in which they travel; for the tests of the label store."""

from __future__ import annotations

import numpy as np

from teacher_wire.core.axes import Entries
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import AnswerShape, Field, SignalSpec, TeacherSignals
from teacher_wire.core.tensor import DTYPES, Tensor
from teacher_wire.labels.blob import LabelEntry, label_keys
from teacher_wire.score.signals import Hidden, TopK, spec_of

WIDTH = 40
SPECS = {
    "hidden": spec_of("hidden", 300),
    "int8": spec_of("hidden", 300, reduction="int8"),
    "full": spec_of("full", 30),
    "top_k": spec_of("top_k", 300, k=5),
    "top_k_24": spec_of("top_k", 70_000, k=5),
    "both": SignalSpec(300, (Hidden("int8"), TopK(5))),
    "named": spec_of("top_k", 70_000, k=4, extra=3),
}


def entry_of(
    spec: SignalSpec, *, seed: int = 0, tokens: int = 6, dtype: str = "float32", fingerprint: str = "f" * 64
) -> LabelEntry:
    """Random labels of a random sequence; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    wanted = rng.random(tokens) < 0.6
    wanted[0], wanted[-1] = True, False
    rows = int(wanted.sum())
    extra = rng.permuted(np.tile(np.arange(spec.extra_ids + 4, dtype=np.int32), (rows, 1)), axis=1)[:, : spec.extra_ids]
    ids = rng.integers(0, spec.vocab_rows, tokens).astype(np.int32)
    batch = TokenBatch(ids, np.array([0, tokens], np.int32), wanted, extra if spec.extra_ids else None)

    entries = Entries(batch)

    def some(part: Field) -> Tensor:
        numpy_dtype, shape = np.dtype(DTYPES[part.dtype][0]), (entries.total(part.axis), *part.entry)
        if part.name == "topk_ids_NK":
            return Tensor(part.dtype, rng.integers(0, spec.vocab_rows, shape).astype(numpy_dtype))
        bits = rng.integers(0, 256, (*shape, numpy_dtype.itemsize), dtype=np.uint8)
        return Tensor(part.dtype, bits.view(numpy_dtype)[..., 0])  # any bits, NaN and infinity among them

    tensors = {part.name: some(part) for part in spec.fields(AnswerShape(spec.vocab_rows, WIDTH, dtype))}
    return LabelEntry(fingerprint, spec, batch, TeacherSignals(tensors, fingerprint))


def key_of(entry: LabelEntry) -> str:
    return label_keys(entry.fingerprint, entry.spec, entry.sequence)[0]


def assert_same_labels(found: TeacherSignals, expected: TeacherSignals) -> None:
    """Bit for bit, whatever the bits mean."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        assert (other.dtype, other.shape, other.array.dtype) == (tensor.dtype, tensor.shape, tensor.array.dtype), name
        assert other.array.tobytes() == tensor.array.tobytes(), name
    assert found.fingerprint == expected.fingerprint
