"""What a run needs to go on exactly where it was: optimizer, scheduler and random state, as safetensors and JSON.

No pickle and no torch.load: a checkpoint from elsewhere can hold no code. A checkpoint is written in a folder of unfinished things,
made durable, marked, and only then given its name `checkpoint-<step>`; it counts while it can be read. Folders of that name without
our marker, and of any other name, are somebody else's: they are never touched.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from student_trainer.errors import RunError
from student_trainer.files import read_object, sync, sync_tree, write_whole

MARKER = "COMPLETE"
UNFINISHED = ".unfinished"  # what is being written, or being deleted, in a run folder
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_TRAINER = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_STATE = "training_state.json"


def save_state(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, skipped_in_a_row: int = 0) -> None:
    """Writes optimizer and scheduler, and how many steps before this one were left out one after another."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            target = tensors if isinstance(value, torch.Tensor) else scalars
            target[f"{index}.{name}"] = value.contiguous().cpu() if isinstance(value, torch.Tensor) else value
    save_file(tensors, str(folder / _OPTIMIZER))
    plain = {"param_groups": state["param_groups"], "scalars": scalars, "scheduler": _plain(scheduler.state_dict())}
    plain["skipped_in_a_row"] = skipped_in_a_row
    (folder / _STATE).write_text(json.dumps(plain, indent=1))


def load_state(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> int:
    """Restores optimizer and scheduler; returns how many steps had been left out one after another.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        plain = json.loads((folder / _STATE).read_text())
        tensors = load_file(str(folder / _OPTIMIZER))
    except Exception as error:
        raise RunError(f"{folder} cannot be read: {error}") from error
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    # How it computes is this machine's business, and decides where its step counters live.
    for group in plain["param_groups"]:
        group |= {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
    scheduler.load_state_dict(plain["scheduler"])
    return int(plain.get("skipped_in_a_row", 0))


def save_random(folder: Path) -> None:
    """Writes torch's generators, of the host and of the GPU in use; nothing else in a run may draw."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda0"] = torch.cuda.get_rng_state()
    save_file(states, str(folder / _RANDOM))


def load_random(folder: Path) -> str:
    """Restores torch's generators: of the GPUs, that of the one in use, however many there were when it was saved.

    Returns:
        A sentence if what is drawn from here on will not be what it would have been there; empty if it will.
    """
    states = load_file(str(folder / _RANDOM))
    torch.set_rng_state(states["cpu"])
    if not torch.cuda.is_available():
        return "saved on a GPU, resumed without one: dropout will draw other numbers" if "cuda0" in states else ""
    if "cuda0" not in states:
        return "saved without a GPU, resumed on one: dropout will draw other numbers"
    torch.cuda.set_rng_state(states["cuda0"])
    return ""


def writing_folder(run_folder: Path) -> Path:
    """Where what is not finished lies until it is; what lay there before is gone."""
    folder = run_folder / UNFINISHED
    discard_unfinished(run_folder)
    folder.mkdir()
    return folder


def discard_unfinished(run_folder: Path) -> None:
    """Deletes what a process left when it ended in the middle of writing."""
    if (run_folder / UNFINISHED).is_dir():
        shutil.rmtree(run_folder / UNFINISHED)


def publish(written: Path, run_folder: Path) -> None:
    """Makes a written checkpoint durable, marks it with the sizes of its files, and gives it its name in the run folder.

    Raises:
        RunError: a folder of that name is there which this run did not write.
    """
    sizes = {str(f.relative_to(written)): f.stat().st_size for f in sorted(written.rglob("*")) if f.is_file()}
    sync_tree(written)
    write_whole(written / MARKER, json.dumps({"sizes": sizes}, indent=1))
    target = run_folder / written.name
    if target.exists() and not is_ours(target):
        raise RunError(
            f"{target}: is in the way of a checkpoint and was not written by this run; move it, then --resume"
        )
    if target.exists():  # damaged: else it would have been resumed from
        os.replace(target, written.parent / f"replaced-{target.name}")
    os.replace(written, target)
    sync(run_folder)


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end, by a run of ours."""
    return _NAME.fullmatch(folder.name) is not None and folder.is_dir() and (folder / MARKER).is_file()


def is_name(name: str) -> bool:
    """Whether a name is one that a checkpoint may have."""
    return _NAME.fullmatch(name) is not None


def all_ours(run_folder: Path) -> list[Path]:
    """Our checkpoints in a run folder, in the order of their steps."""
    return sorted(filter(is_ours, run_folder.glob("checkpoint-*")), key=step_of)


def in_the_way(run_folder: Path, steps: Callable[[int], bool]) -> Path | None:
    """A folder of somebody else with the name of a checkpoint at a step for which `steps` holds."""
    named = (path for path in sorted(run_folder.glob("checkpoint-*")) if _NAME.fullmatch(path.name))
    return next((path for path in named if not is_ours(path) and steps(step_of(path))), None)


def rotate(run_folder: Path, keep: int, step: int, spare: Path | None = None) -> None:
    """Removes all but the `keep` newest of our checkpoints up to `step`, and `spare`; each leaves its name first: a torn one must not count."""
    for folder in [folder for folder in all_ours(run_folder) if step_of(folder) <= step][:-keep]:
        if folder == spare:
            continue
        leaving = run_folder / UNFINISHED
        leaving.mkdir(exist_ok=True)
        os.replace(folder, leaving / f"old-{folder.name}")
    discard_unfinished(run_folder)


def newest_whole(run_folder: Path, tell: Callable[[str], None] = lambda _: None) -> Path | None:
    """The last checkpoint that was written to its end and can be read.

    Args:
        tell: called with a sentence about each newer one that cannot.
    """
    for folder in reversed(all_ours(run_folder)):
        damage = damage_of(folder)
        if not damage:
            return folder
        tell(f"{folder.name} is damaged and not used: {damage}")
    return None


def check_chosen(run_folder: Path, named: Path) -> Path:
    """The checkpoint of a run that somebody has named, by its place in the run's folder.

    Raises:
        RunError: it is not one of this run, or cannot be read.
    """
    folder = run_folder / named.name
    if named.resolve() != folder.resolve() or not is_ours(folder):
        there = ", ".join(found.name for found in all_ours(run_folder)) or "none"
        raise RunError(f"--resume-from {named}: is no checkpoint of the run in {run_folder}; there are: {there}")
    if damage := damage_of(folder):
        raise RunError(
            f"--resume-from {named}: is damaged: {damage}; choose another one, or the newest whole one by --resume"
        )
    return folder


def chosen(run_folder: Path, named: Path, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The checkpoint that somebody has named; newer ones get another name, so that no later resumption takes them for this branch's.

    Args:
        tell: called with a sentence about each of these.

    Raises:
        RunError: as `check_chosen`.
    """
    folder = check_chosen(run_folder, named)
    for newer in all_ours(run_folder):
        if step_of(newer) > step_of(folder):
            aside = next(
                place
                for number in itertools.count()
                if not (place := run_folder / f"before-{newer.name}{f'.{number}' if number else ''}").exists()
            )
            os.replace(newer, aside)
            tell(f"{newer.name} is newer than {folder.name}, from which the run goes on: it is kept as {aside.name}")
    return folder


def damage_of(folder: Path) -> str:
    """What keeps a checkpoint from being resumed from, as far as shows without reading every tensor; empty if nothing does."""
    files = {path.name for path in folder.iterdir()}
    if not files & set(_WEIGHTS):
        return "it has no weights"
    for name in (_OPTIMIZER, _RANDOM, _STATE, _TRAINER):
        if name not in files:
            return f"{name} is missing"
    try:
        sizes = read_object(folder / MARKER)["sizes"]
    except (OSError, ValueError, KeyError):
        sizes = {}  # of an earlier version
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            return f"{name} is missing" if there is None else f"{name} has {there:,} bytes, {size:,} were written"
    written = [folder / name for name in sizes] or sorted(
        folder.rglob("*")
    )  # what somebody else put there is not asked
    for path in written:
        try:
            if path.suffix == ".safetensors":
                with safe_open(str(path), "pt"):  # reads its head, and holds it against the size of the file
                    pass
            elif path.suffix == ".json":
                read_object(path)
        except Exception as error:  # safetensors has an error class of its own
            return f"{path.name}: {' '.join(str(error).split())}"
    index = folder / "model.safetensors.index.json"
    shards = set(read_object(index).get("weight_map", {}).values()) if index.is_file() else set()
    if absent := sorted(shards - files):
        return f"{absent[0]} is missing"
    step = read_object(folder / _TRAINER).get("global_step")
    return "" if step == step_of(folder) else f"it is of step {step}, not of {step_of(folder)}"


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
