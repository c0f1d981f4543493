"""The labels of one sequence as bytes, and the key that names what was asked.

In: a teacher's fingerprint, a SignalSpec, one sequence and its labels; out: safetensors bytes with a checksum, and back with
everything verified. Never pickle. A checksum finds damage, not forgery: who may write the folder may write labels.

Axes as in `messages`; a blob holds B = 1 sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from teacher_wire.core.axes import Axis, Entries, axis_of
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.tensor import DTYPES, Tensor, pack_uint24, unpack_uint24

FORMAT = "lyceum-label/1"
_ENTRY = "label"  # of the file's metadata
_HEADER_LIMIT = 1 << 20
_IDS, _WANTED, _EXTRA = "token_ids_T", "wanted_T", "extra_ids_NM"
# What bytes from a disk can be in place of a blob; MemoryError and our own faults are not among them.
_BROKEN = (SafetensorError, ValueError, KeyError, TypeError, LabelError)


@dataclass(frozen=True)
class LabelEntry:
    """Labels and what they are labels of.

    Attributes:
        fingerprint: of the teacher.
        spec: which signal.
        sequence: one sequence.
        signals: the teacher's answer about its wanted rows.
    """

    fingerprint: str
    spec: SignalSpec
    sequence: TokenBatch
    signals: TeacherSignals


@dataclass(frozen=True)
class LabelSummary:
    """What the header of a blob says; not verified. `transport` is the name of the spec."""

    fingerprint: str
    transport: str
    tokens: int
    rows: int


def label_keys(fingerprint: str, spec: SignalSpec, batch: TokenBatch) -> list[str]:
    """The key of each sequence: sha256 over everything that decides its labels.

    Parts are prefixed with their length, so that no two different inputs make the same bytes.
    """
    return _keys(fingerprint, spec.json(), batch)


def _keys(fingerprint: str, asked: str, batch: TokenBatch) -> list[str]:
    shared = hashlib.sha256()
    for text in (FORMAT, fingerprint, asked):
        _add(shared, text.encode())
    ids_T, wanted_T = batch.token_ids_T.astype("<i4"), batch.wanted_T.astype(np.uint8)
    extra_NM = None if batch.extra_ids_NM is None else batch.extra_ids_NM.astype("<i4")
    cu_B1, rows_B1 = batch.cu_lengths_B1, batch.row_bounds_B1
    keys = []
    for b in range(batch.sequences):
        digest = shared.copy()
        _add(digest, ids_T[cu_B1[b] : cu_B1[b + 1]].tobytes())
        _add(digest, wanted_T[cu_B1[b] : cu_B1[b + 1]].tobytes())
        _add(digest, b"" if extra_NM is None else extra_NM[rows_B1[b] : rows_B1[b + 1]].tobytes())
        keys.append(digest.hexdigest())
    return keys


def encode_labels(key: str, entry: LabelEntry) -> bytes:
    """A blob.

    Raises:
        LabelError: the labels are not those of one sequence, or `key` is not theirs.
    """
    asked = entry.spec.json()
    _check(key, entry.fingerprint, asked, entry.sequence, entry.signals)
    tensors = entry.signals.tensors
    arrays = {name: _narrow(tensor) for name, tensor in tensors.items()}
    arrays[_IDS] = np.ascontiguousarray(entry.sequence.token_ids_T)
    arrays[_WANTED] = entry.sequence.wanted_T.astype(np.uint8)
    if entry.sequence.extra_ids_NM is not None:
        arrays[_EXTRA] = np.ascontiguousarray(entry.sequence.extra_ids_NM)
    metadata = {
        "format": FORMAT,
        "key": key,
        "fingerprint": entry.fingerprint,
        "spec": asked,
        "dtypes": json.dumps({name: tensor.dtype for name, tensor in tensors.items()}, sort_keys=True),
    }
    # One entry: safetensors writes several in an order of its own each time, and the same labels are to be the same file.
    return save(arrays, {_ENTRY: json.dumps(metadata | {"sha256": _checksum(metadata, arrays)}, sort_keys=True)})


def decode_labels(key: str, data: bytes) -> TeacherSignals:
    """The labels in a blob, all of it verified; arrays are read-only views or copies of `data`.

    Raises:
        LabelError: it is damaged, or not the labels of `key`.
    """
    try:
        arrays = load(data)
        metadata = _metadata(_header(data[8 : 8 + int.from_bytes(data[:8], "little")]))
        checksum = metadata.pop("sha256")
        if metadata["format"] != FORMAT or metadata["key"] != key or checksum != _checksum(metadata, arrays):
            raise LabelError("another format, key or checksum", field="sha256", value=checksum)
        ids_T, wanted_T = arrays.pop(_IDS), arrays.pop(_WANTED)
        cu_B1 = np.array([0, ids_T.size], np.int32)
        sequence = TokenBatch(ids_T, cu_B1, wanted_T.view(np.bool_), arrays.pop(_EXTRA, None))
        dtypes = json.loads(metadata["dtypes"])
        tensors = {name: _widen(dtypes[name], array) for name, array in arrays.items()}
        signals = TeacherSignals(tensors, metadata["fingerprint"])
        _check(key, metadata["fingerprint"], metadata["spec"], sequence, signals)
    except _BROKEN as error:
        raise LabelError(f"damaged labels: {error}", field="labels", value=key) from error
    return signals


def read_summary(file: BinaryIO) -> LabelSummary:
    """What the header of an open blob says, without its tensors.

    Raises:
        LabelError: it has no header of ours.
    """
    try:
        size = int.from_bytes(file.read(8), "little")
        header = _header(file.read(min(size, _HEADER_LIMIT)))
        metadata = _metadata(header)
        if metadata["format"] != FORMAT:
            raise LabelError("another format", field="format", value=metadata["format"], limit=FORMAT)
        tensors = header.keys() - {"__metadata__", _IDS, _WANTED, _EXTRA}
        rows = max((header[name]["shape"][0] for name in tensors if axis_of(name) is Axis.ROW), default=0)
        name = SignalSpec.name_in(metadata["spec"])
        return LabelSummary(metadata["fingerprint"], name, header[_IDS]["shape"][0], rows)
    except _BROKEN as error:
        raise LabelError(f"not a blob of labels: {error}", field="header") from error


def read_figures(path: Path, key: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Those of the named float tensors that the blob of `key` in a file has, without its others: states are a thousand times as large.

    The checksum, which is over all of them, is not verified; None if the file is not that blob.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = json.loads((file.metadata() or {})[_ENTRY])
            if metadata["format"] != FORMAT or metadata["key"] != key:
                return None
            return {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, *_BROKEN):
        return None


def whole_size(path: Path) -> int:
    """Bytes of the blob in a file; 0 if there is none, or it is shorter or longer than its header says: a torn one is found without reading it."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = _header(file.read(min(header_bytes, _HEADER_LIMIT)))
            size = os.fstat(file.fileno()).st_size
        tensors_bytes = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
    except (OSError, *_BROKEN):
        return 0
    return size if size == 8 + header_bytes + tensors_bytes else 0


def _check(key: str, fingerprint: str, asked: str, sequence: TokenBatch, signals: TeacherSignals) -> None:
    """Refuses labels that are not those of one sequence under this key."""
    if sequence.sequences != 1:
        raise LabelError("one sequence a blob", field="sequences", value=sequence.sequences, limit=1)
    entries = Entries(sequence)
    for name, tensor in signals.tensors.items():
        expected = entries.total(axis_of(name))
        if tensor.shape[:1] != (expected,):
            raise LabelError("rows do not fit the sequence", field=name, value=tensor.shape, limit=expected)
    if _keys(fingerprint, asked, sequence) != [key]:
        raise LabelError("not the labels of this key", field="key", value=key)


def _header(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("__metadata__"), dict):
        raise LabelError("no metadata", field="header")
    return found


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    found = json.loads(header["__metadata__"][_ENTRY])
    if not isinstance(found, dict):
        raise LabelError("no metadata of ours", field="header")
    return found


def _checksum(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of every name, type, shape and byte, `sha256` itself left out."""
    digest = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        _add(digest, name.encode())
        _add(digest, text.encode())
    for name, array in sorted(arrays.items()):
        for text in (name, array.dtype.str, str(array.shape)):
            _add(digest, text.encode())
        _add(digest, array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _add(digest: Any, part: bytes | memoryview) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _narrow(tensor: Tensor) -> np.ndarray:
    """The array as it is kept: 24-bit ids as three bytes each, others as they are in memory."""
    return pack_uint24(tensor.array) if tensor.dtype == "uint24" else np.ascontiguousarray(tensor.array)


def _widen(dtype: str, array: np.ndarray) -> Tensor:
    """The tensor again; refuses an array that is not kept in this way."""
    if dtype != "uint24":
        return Tensor(dtype, array)
    if array.dtype != np.uint8 or array.shape[-1:] != (DTYPES[dtype][1],):
        raise LabelError("uint24 is kept as three bytes", field="dtype", value=array.dtype)
    ids = np.empty(array.shape[:-1], np.uint32)
    unpack_uint24(array.reshape(-1), ids)
    return Tensor(dtype, ids)
