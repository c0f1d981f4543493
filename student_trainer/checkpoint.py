"""What a run needs to go on exactly where it was: optimizer, scheduler and random state, as safetensors and JSON.

No pickle and no torch.load: a checkpoint from elsewhere can hold no code. A checkpoint counts only once its marker
is there, and the marker is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from student_trainer.errors import RunError

MARKER = "COMPLETE"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_STATE = "training_state.json"


def save_state(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Writes optimizer and scheduler."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            target = tensors if isinstance(value, torch.Tensor) else scalars
            target[f"{index}.{name}"] = value.contiguous().cpu() if isinstance(value, torch.Tensor) else value
    save_file(tensors, str(folder / _OPTIMIZER))
    plain = {"param_groups": state["param_groups"], "scalars": scalars, "scheduler": _plain(scheduler.state_dict())}
    (folder / _STATE).write_text(json.dumps(plain, indent=1))


def load_state(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restores optimizer and scheduler.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        plain = json.loads((folder / _STATE).read_text())
        tensors = load_file(str(folder / _OPTIMIZER))
    except Exception as error:
        raise RunError(f"checkpoint {folder} cannot be read: {error}") from error
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    # How it computes is this machine's business, and decides where its step counters live.
    for group in plain["param_groups"]:
        group |= {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
    scheduler.load_state_dict(plain["scheduler"])


def save_random(folder: Path) -> None:
    """Writes torch's generators; nothing else in a run may draw (architecture.md A9)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    save_file(states, str(folder / _RANDOM))


def load_random(folder: Path) -> None:
    """Restores torch's generators."""
    states = load_file(str(folder / _RANDOM))
    torch.set_rng_state(states.pop("cpu"))
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([states[f"cuda{i}"] for i in range(len(states))])


def mark_complete(folder: Path) -> None:
    """Makes the folder's files durable, then writes the marker."""
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)
    marker = folder / MARKER
    marker.write_text("every file of this checkpoint was on disk before this one\n")
    _sync(marker)
    _sync(folder)


def rotate(run_folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest complete checkpoints, the marker of each first: a torn one must not count."""
    complete = sorted((f for f in run_folder.glob("checkpoint-*") if (f / MARKER).is_file()), key=step_of)
    for folder in complete[:-keep]:
        (folder / MARKER).unlink()
        shutil.rmtree(folder)


def newest_complete(run_folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; unfinished ones are removed."""
    complete = []
    for folder in run_folder.glob("checkpoint-*"):
        if not (folder / MARKER).is_file():
            shutil.rmtree(folder)
        else:
            complete.append(folder)
    return max(complete, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint folder."""
    return int(folder.name.rsplit("-", 1)[1])


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which the config makes again."""
    return {key: value for key, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, int | float | str | bool | type(None))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
