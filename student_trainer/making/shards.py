"""Safetensors copied from file to file with other names, in constant memory: the bytes of each tensor pass through a buffer of 16 MiB.

In: shards and a rule of names; out: shards of the same layout without the tensors that the rule drops. A file begins with the length
of its header (8 bytes, little endian), then the header (JSON: name -> dtype, shape, data_offsets), then the bytes of the tensors. The
safetensors library writes what is in memory only, and a 70B model's shards are 5 GB each; hence these lines.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from student_trainer.errors import ModelError
from student_trainer.making.teacher import INDEX_NAME, WHOLE_NAME

_BUFFER = 16 << 20
_MOST_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its entry of the header, and its place behind the header."""

    entry: dict[str, Any]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A file's tensors by name, where their bytes begin, and what the header says of the file."""

    path: Path
    tensors: dict[str, Tensor]
    data_begin: int
    metadata: dict[str, str] | None


def read_shard(path: Path) -> Shard:
    """The header of a file, held against its size.

    Raises:
        ModelError: the file is cut short, or no safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None)
        tensors = {name: Tensor(entry, *entry["data_offsets"]) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is no whole safetensors file: {error}") from error
    ends = max((tensor.end for tensor in tensors.values()), default=0)
    if ends != size - 8 - length:
        raise ModelError(
            f"{path}: is cut short or damaged: its header tells of {ends} bytes, it has {size - 8 - length}"
        )
    return Shard(path, tensors, 8 + length, metadata)


def copy_renamed(
    shards: Sequence[Shard], target: Path, rename: Callable[[str], str | None], tell: Callable[[int], None]
) -> int:
    """Writes the tensors that `rename` names into `target`, one file for each shard that keeps any, with an index if there are several.

    Args:
        shards: of the source.
        target: an existing folder.
        rename: from a tensor's name to its new one; None leaves it out.
        tell: called with the bytes copied so far.

    Returns:
        Bytes of the weights.

    Raises:
        OSError: the disk does not take it.
    """
    kept = [
        (shard, names)
        for shard in shards
        if (names := {new: tensor for name, tensor in shard.tensors.items() if (new := rename(name)) is not None})
    ]
    weight_map: dict[str, str] = {}
    done = 0
    for number, (shard, tensors) in enumerate(kept, 1):
        file = WHOLE_NAME if len(kept) == 1 else f"model-{number:05}-of-{len(kept):05}.safetensors"
        done = _write(shard, tensors, target / file, done, tell)
        weight_map |= dict.fromkeys(tensors, file)
    if len(kept) > 1:
        index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return done


def _write(shard: Shard, tensors: dict[str, Tensor], path: Path, done: int, tell: Callable[[int], None]) -> int:
    ordered = sorted(tensors.items(), key=lambda item: item[1].begin)
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    place = 0
    for name, tensor in ordered:
        length = tensor.end - tensor.begin
        header[name] = {**tensor.entry, "data_offsets": [place, place + length]}
        place += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with shard.path.open("rb") as source, path.open("wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            source.seek(shard.data_begin + tensor.begin)
            _copy(source, written, tensor.end - tensor.begin)
            done += tensor.end - tensor.begin
            tell(done)
    return done


def _copy(source: BinaryIO, written: BinaryIO, length: int) -> None:
    while length:
        piece = source.read(min(_BUFFER, length))
        if not piece:
            raise OSError("the file of weights ended while it was copied")
        written.write(piece)
        length -= len(piece)
