"""Whether a model folder's safetensors files are whole, in milliseconds: their headers are read, no weight is.

In: what a config calls the model; out: nothing, or one line that names the damaged file. Loading would find it too, after 40 s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from teacher_server.errors import ServerConfigError

_LENGTH_BYTES = 8
_HEADER_LIMIT_BYTES = 100 << 20  # of the format
_INDEX = "model.safetensors.index.json"


def check_weights(model: str) -> None:
    """Refuses a local folder with a weight file that is cut, empty, missing from its index's list, or none.

    Raises:
        ServerConfigError: naming the file.
    """
    folder = Path(model).expanduser()  # of a hub id there is none
    for file in sorted(folder.glob("*.safetensors")):
        check_file(file)
    index = folder / _INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ServerConfigError(f"weight index {index} is damaged: it has no weight_map") from error
        missing = sorted(name for name in names if not (folder / str(name)).is_file())
        if missing:
            raise ServerConfigError(f"model folder {folder}: {_INDEX} lists {', '.join(missing)}, which is not there")


@dataclass(frozen=True)
class TensorOutline:
    """What a header says of one tensor: dtype in safetensors' words, and shape."""

    dtype: str
    shape: tuple[int, ...]


def check_file(file: Path) -> None:
    """Refuses a safetensors file whose header cannot be read, or whose size is not what the header says.

    Raises:
        ServerConfigError: naming the file.
    """
    outline_of(file)


def outline_of(file: Path, max_header_bytes: int = _HEADER_LIMIT_BYTES) -> dict[str, TensorOutline]:
    """Every tensor of a safetensors file by name, if its header is no longer than that.

    Raises:
        ServerConfigError: as `check_file`.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(max_header_bytes, size - _LENGTH_BYTES):
                raise ServerConfigError(
                    f"weight file {file} is damaged: {size} bytes, which hold no safetensors header"
                )
            header = json.loads(data.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        outline = {
            name: TensorOutline(str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in entries.items()
        }
    except OSError as error:
        raise ServerConfigError(f"weight file {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, ServerConfigError):
            raise
        raise ServerConfigError(f"weight file {file} is damaged: its header is no safetensors header") from error
    wanted = _LENGTH_BYTES + length + max(ends, default=0)
    if size != wanted:
        raise ServerConfigError(f"weight file {file} is damaged: it has {size} bytes, its header says {wanted}")
    return outline
