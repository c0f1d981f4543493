"""`student-trainer new`: a student's folder from a teacher's, whole or not at all, and a starter config for the pair.

In: `NewStudent`; out: a model folder that transformers reads, with tokenizer, templates and generation config byte for byte, `made_from.json`
(what was kept, and why), `student.yaml` and `teacher.yaml`. Fewer layers evenly spaced are copied from file to file, and no weight is
loaded; by influence the teacher computes a sample first; a size of the table starts at random.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig

from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.files import disk_trouble_named, free_bytes, sync_tree
from student_trainer.making import depth, outline, width
from student_trainer.making.influence import block_influence, sample_ids
from student_trainer.making.shards import copy_renamed, read_shard
from student_trainer.making.starter import STUDENT_NAME, TEACHER_NAME, Pair, student_yaml, teacher_yaml
from student_trainer.making.teacher import CONFIG_NAME, TeacherFiles, copy_beside, find_teacher
from student_trainer.model.limits import position_limit
from student_trainer.progress import ProgressBar

RECORD_NAME = "made_from.json"
By = Literal["even", "influence"]


@dataclass(frozen=True)
class NewStudent:
    """What is asked for.

    Attributes:
        out: folder of the student; must not exist, or be empty.
        teacher: folder or hub id.
        layers: how many to keep; with `size` how many the student has; None: as the size says.
        by: which to keep.
        sample: rows (`path` or `path#N`) that influence is measured on.
        size: a name of the family's table; None: the teacher's own width, and its weights.
        rows: for the starter config; None: those of the sample, or a placeholder.
        max_tokens: longest row of the sample.
        seed: of random weights.
        dtype: of random weights; None: the teacher's.
    """

    out: Path
    teacher: str
    layers: int | None = None
    by: By = "even"
    sample: str | None = None
    size: str | None = None
    rows: str | None = None
    max_tokens: int = 2048
    seed: int = 0
    dtype: str | None = None


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        folder: the student's.
        parameters: of the student, and of the teacher; tied ones counted once.
        kept: for each layer the teacher's number; empty where weights are random.
        influence: per layer of the teacher; empty where it was not measured.
        notes: what a user should know, a sentence each.
    """

    folder: Path
    parameters: tuple[int, int]
    kept: tuple[int, ...]
    influence: tuple[float, ...]
    notes: tuple[str, ...]


def make_student(asked: NewStudent, console: Console) -> Made:
    """Makes the student.

    Raises:
        ConfigError: options that do not go together, too many layers, no such size.
        ModelError: a teacher that cannot be read or whose layers cannot be taken out.
        DataError: a sample that cannot be read.
        RunError: the folder exists, or the disk does not take the student.
    """
    _check_asked(asked)
    teacher = find_teacher(asked.teacher, weights=asked.size is None)
    config = outline.read_config(teacher.folder, teacher.name)
    whole = outline.outline_of(config, f"--from {teacher.name}")
    return (_sized if asked.size is not None else _shallower)(asked, teacher, whole, console)


def _check_asked(asked: NewStudent) -> None:
    if asked.out.exists() and not (asked.out.is_dir() and not any(asked.out.iterdir())):
        raise RunError(f"{asked.out}: exists already and is not empty; choose another folder, or take it away first")
    if asked.layers is None and asked.size is None:
        raise ConfigError("nothing says how the student is smaller: set --layers N, --width NAME, or both")
    if asked.size is not None and asked.by != "even":
        raise ConfigError(
            "--by influence chooses among the teacher's layers, and with --width all weights are random: leave one out"
        )
    if asked.by == "influence" and asked.sample is None:
        raise ConfigError(
            "--by influence measures the layers on rows: add --sample rows.jsonl (rows.jsonl#64 takes 64 of them)"
        )
    if asked.by == "even" and asked.sample is not None:
        raise ConfigError(
            "--sample is what influence is measured on: add --by influence, or name rows for training by --data"
        )
    if asked.size is None and asked.dtype is not None:
        raise ConfigError(
            f"--dtype {asked.dtype}: the layers are copied as they are; it is for random weights (--width)"
        )


def _shallower(asked: NewStudent, teacher: TeacherFiles, whole: Any, console: Console) -> Made:
    config = whole.config
    count = int(config.num_hidden_layers)
    assert asked.layers is not None
    depth.check_count(asked.layers, count)
    names = outline.layer_names(whole, teacher.name)
    shards = [read_shard(teacher.folder / shard) for shard in teacher.shards]
    _check_tensors(names, [name for shard in shards for name in shard.tensors], teacher.name)
    influence: Sequence[float] = ()
    if asked.by == "influence":
        assert asked.sample is not None
        influence = _measure(asked, teacher, names, console)
        kept = depth.most_influential(influence, asked.layers)
    else:
        kept = depth.even_layers(asked.layers, count)
    types = config.to_dict().get("layer_types")  # some families derive it, and take none
    made = depth.student_config(
        teacher.config, kept, outline.depth_field(config), None if types is None else [types[i] for i in kept]
    )
    smaller = outline.outline_of(_parsed(made, teacher.name), f"--layers {asked.layers}")
    outline.check_layers(whole, smaller, kept, teacher.name)
    rename = names.renamer(kept)
    needed = sum(t.end - t.begin for shard in shards for name, t in shard.tensors.items() if rename(name) is not None)
    beyond = names.beyond(name for shard in shards for name in shard.tensors)
    notes = [f"{len(beyond)} tensors of layers behind the last (multi-token prediction) are left out"] if beyond else []
    with _folder(asked.out, needed) as folder:
        with ProgressBar(console, "copying layers", needed >> 20 or 1) as bar:
            copy_renamed(shards, folder, rename, lambda done: bar.update(done >> 20))
        _write_rest(folder, asked, teacher, made, smaller, {"kept_layers": list(kept), "by": asked.by, "sample": asked.sample, "influence": list(influence)})  # fmt: skip
    return Made(asked.out, (_parameters(smaller), _parameters(whole)), kept, tuple(influence), tuple(notes))


def _measure(asked: NewStudent, teacher: TeacherFiles, names: outline.LayerNames, console: Console) -> list[float]:
    assert asked.sample is not None
    with console.status("reading the sample"):
        rows = sample_ids(teacher, asked.sample, asked.max_tokens)
    place = names.prefixes[0].removesuffix(".")
    with ProgressBar(console, "measuring layers", len(rows)) as bar:
        return block_influence(teacher, lambda model: model.get_submodule(place), rows, bar.update)


def _sized(asked: NewStudent, teacher: TeacherFiles, whole: Any, console: Console) -> Made:
    assert asked.size is not None
    size = width.size_of(teacher.config, asked.size)
    made = width.sized_config(teacher.config, size, asked.layers)
    dtype = _dtype(asked, teacher)
    made["dtype"] = str(dtype).removeprefix("torch.")
    made.pop("torch_dtype", None)
    config = _parsed(made, teacher.name)
    smaller = outline.outline_of(config, f"--width {asked.size}")
    if asked.layers is not None and asked.layers < 1:
        raise ConfigError(f"--layers {asked.layers}: a student has at least 1 layer")
    with _folder(asked.out, _parameters(smaller) * dtype.itemsize) as folder:
        with console.status(f"drawing {_parameters(smaller):,} random weights"):
            state = torch.get_rng_state()
            torch.manual_seed(asked.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            torch.set_rng_state(state)
            model.generation_config = GenerationConfig()  # the teacher's file takes its place
            model.save_pretrained(folder)
        made["architectures"] = teacher.config.get("architectures", [type(model).__name__])
        _write_rest(folder, asked, teacher, made, smaller, {"width": asked.size.lower(), "layers": config.num_hidden_layers, "seed": asked.seed})  # fmt: skip
    note = (
        f"its weights are random: the shape is {asked.size.lower()}'s, and nothing of its published weights or of the teacher's is in it; "
        "it needs far more tokens than a student with the teacher's layers"
    )
    return Made(asked.out, (_parameters(smaller), _parameters(whole)), (), (), (note,))


def _dtype(asked: NewStudent, teacher: TeacherFiles) -> torch.dtype:
    name = asked.dtype or teacher.config.get("dtype") or teacher.config.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {name}: choose float32, bfloat16 or float16")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _parsed(made: dict[str, Any], name: str) -> Any:
    """transformers' config of a student's config.json, read from a file as everybody will read it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(made), encoding="utf-8")
        return outline.read_config(Path(folder), name)


def _check_tensors(names: outline.LayerNames, tensors: Sequence[str], teacher: str) -> None:
    """Every layer has weights of that name in the files: else nothing would be taken out."""
    absent = [
        i
        for i in range(names.count)
        if not any(name.startswith(f"{prefix}{i}.") for prefix in names.prefixes for name in tensors)
    ]
    if absent:
        raise ModelError(
            f"--from {teacher}: its files have no weights of layer {absent[0]} ({names.prefixes[0]}{absent[0]}.*)"
        )


def _write_rest(
    folder: Path, asked: NewStudent, teacher: TeacherFiles, config: dict[str, Any], model: Any, record: dict[str, Any]
) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    copied = copy_beside(teacher, folder)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    is_local = Path(teacher.name).expanduser().is_dir()
    where = str(Path(teacher.name).expanduser().absolute()) if is_local else teacher.name
    facts = {"format": 1, "teacher": where, **record, "copied": copied, "parameters": _parameters(model)}
    (folder / RECORD_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    pair = Pair(
        where,
        asked.out.absolute(),
        asked.rows or asked.sample,
        position_limit(model.config),
        asked.size is not None,
        torch.cuda.is_available(),
    )
    (folder / STUDENT_NAME).write_text(student_yaml(pair), encoding="utf-8")
    (folder / TEACHER_NAME).write_text(teacher_yaml(pair), encoding="utf-8")


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@contextmanager
def _folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the block; nothing is left of it if the block fails or is interrupted."""
    free = free_bytes(out.parent)
    if needed > free:
        raise RunError(
            f"{out}: the student takes {needed / 2**30:,.2f} GiB, and {free / 2**30:,.2f} are free; make room, or choose another disk"
        )
    partial = out.parent / f".{out.name}.unfinished"
    with disk_trouble_named(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            if out.exists():
                out.rmdir()  # an empty one
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
