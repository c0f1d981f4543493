"""The folder of a whole model: an adapter merged into its base, or the files of a model that is whole already.

In: `Trained`; out: weights, config, tokenizer, template and generation config, and nothing else: projectors, optimizer and what else a run
or checkpoint holds stay behind. Files that need no change are copied byte for byte.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from student_trainer.errors import ModelError
from student_trainer.export.trained import Trained
from student_trainer.making.teacher import CONFIG_NAME, COPIED, INDEX_NAME, WHOLE_NAME
from student_trainer.model import adapters, internlm, precision
from student_trainer.model.load import Student, load_student
from student_trainer.model.merged import MergedWriter, check_finite, merged_state

_TEMPLATES = "additional_chat_templates"


def load_trained(trained: Trained) -> tuple[Any, Student | None]:
    """The trained model as it is asked, and the student under it where it has adapters.

    Raises:
        ModelError: it cannot be loaded.
    """
    if trained.is_adapter:
        student = load_student(trained.settings, seed=0)
        return student.model, student
    return load_plain(trained.folder), None


def load_plain(folder: Path, **where: Any) -> Any:
    """A model folder as transformers reads it, on the GPU if there is one.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    internlm.register()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **{"dtype": "auto", **where}
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {str(error)[:300]}") from error
    if absent := sorted(report["missing_keys"]):
        raise ModelError(f"{folder}: lacks {len(absent)} weights, {absent[0]} first")
    return model.cuda() if torch.cuda.is_available() else model


def write_merged(trained: Trained, student: Student | None, folder: Path, dtype: str) -> None:
    """Fills `folder`.

    Args:
        student: with its adapters; None for a model that is whole.
        folder: an existing one.
        dtype: of the weights.

    Raises:
        ModelError: adapters that cannot be merged, weights that are not finite, or a model that cannot be saved.
        OSError: the disk does not take it.
    """
    wanted = getattr(torch, dtype)
    base = trained.folder
    if student is not None:
        state = merged_state(student, None, wanted)
        check_finite(state)
        MergedWriter(student).write(state, folder, wanted)
        (folder / "generation_config.json").unlink(missing_ok=True)  # transformers' own; the base's follows
        sources = adapters.find(trained.settings)
        base = Path(sources.model) if Path(sources.model).is_dir() else trained.folder
        _keep_generation(student, base, folder)
    elif dtype == trained.dtype:
        _copy_weights(trained.folder, folder)
    else:
        model = load_plain(trained.folder, dtype=wanted)
        check_finite(model.state_dict())
        model.save_pretrained(folder)
        precision.write_dtype(folder, wanted)
    _copy_tokenizer(trained.folder, base, folder)


def _copy_weights(source: Path, folder: Path) -> None:
    shutil.copyfile(source / CONFIG_NAME, folder / CONFIG_NAME)
    files = [WHOLE_NAME]
    if (source / INDEX_NAME).is_file():
        shutil.copyfile(source / INDEX_NAME, folder / INDEX_NAME)
        files = sorted(set(json.loads((source / INDEX_NAME).read_text())["weight_map"].values()))
    if absent := [file for file in files if not (source / file).is_file()]:
        raise ModelError(f"{source}: has no {absent[0]}; weights are read from safetensors alone")
    for file in files:
        shutil.copyfile(source / file, folder / file)


def _keep_generation(student: Student, base: Path, folder: Path) -> None:
    """How the base's answers are sampled: its own file, or for a base of the hub what transformers read of it."""
    if (base / "generation_config.json").is_file():
        return  # `_copy_tokenizer` takes it
    kept = getattr(student.causal_lm, "generation_config", None)
    if kept is not None:
        kept.to_json_file(folder / "generation_config.json", use_diff=True)


def _copy_tokenizer(first: Path, second: Path, folder: Path) -> None:
    """Tokenizer, templates and generation config: those beside the trained weights, else those of the base."""
    has_own = any((first / name).is_file() for name in adapters.TOKENIZER_FILES)
    for name in COPIED:
        if name == "generation_config.json" or name.startswith(("LICENSE", "NOTICE", "USE_POLICY")):
            places: tuple[Path, ...] = (first, second)
        else:  # never half of one tokenizer and half of another
            places = (first,) if has_own else (second,)
        source = next((place / name for place in places if (place / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, folder / name)
    templates = (first if has_own else second) / _TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, folder / _TEMPLATES)
