"""A student on disk: weights, config, tokenizer, as transformers reads them; tried before a run begins, and only while its weights are numbers.

In: a model and its tokenizer; out: files in a folder. What transformers refuses to write although it has read it is written as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from student_trainer.errors import ModelError

if TYPE_CHECKING:
    from student_trainer.model.load import Student

_TRIED_BYTES = 2 << 30  # models up to this size are saved whole as a trial; of larger ones everything but the weights
_GENERATION = "generation_config.json"


def save_student(
    student: Student, folder: Path, state_dict: dict[str, torch.Tensor] | None = None, *, exported: bool = False
) -> None:
    """Writes a student, or its adapters, with the tokenizer; `exported` in `model.dtype`, else every bit, for a run to go on with."""
    folder.mkdir(parents=True, exist_ok=True)
    with _kept_generation_config(student.model, folder):
        student.save(folder, state_dict, exported=exported)
    student.tokenizer.save_pretrained(folder)


def try_saving(student: Student, folder: Path) -> None:
    """Writes into an empty folder what the end of the run will write, so that what fails fails before step 0.

    Raises:
        ModelError: with what transformers says.
        OSError: the disk does not take it.
    """
    model, tokenizer = student.model, student.tokenizer
    try:
        if saved_bytes(model) <= _TRIED_BYTES:
            save_student(student, folder, exported=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with _kept_generation_config(model, folder):
                model.config.save_pretrained(folder)
                if getattr(model, "generation_config", None) is not None:
                    model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # validation, shared tensors, quantised weights: each has a class of its own
        if type(error).__name__ == "SafetensorError":
            raise
        raise ModelError(f"the trained model could not be saved, so no step was made: {str(error)[:300]}") from error


@contextlib.contextmanager
def _kept_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Has a generation config that transformers reads and does not write (a temperature without sampling) written as it was read."""
    kept = getattr(model, "generation_config", None)
    try:
        if kept is not None:
            kept.validate(strict=True)
    except ValueError:
        assert kept is not None
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = kept
        if (folder / _GENERATION).is_file():  # not beside adapters
            kept.to_json_file(folder / _GENERATION, use_diff=True)
    else:
        yield


def saved_bytes(model: Any) -> int:
    """Bytes of the weights that `save_student` writes."""
    return sum(p.nbytes for p in _saved(model))


def state_bytes(model: Any) -> int:
    """Bytes of a checkpoint: the saved weights, and two moments of each trained one."""
    return saved_bytes(model) + 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _saved(model: Any) -> list[torch.Tensor]:
    adapted = hasattr(model, "peft_config")
    return [p for p in model.parameters() if p.requires_grad or not adapted]


@torch.no_grad()
def not_finite(model: Any, *, trained_only: bool = False) -> str:
    """The name of a weight that holds NaN or infinity; empty if there is none. Waits for the device once."""
    named = [
        (name, p) for name, p in model.named_parameters()
        if p.is_floating_point() and p.numel() and (p.requires_grad or not trained_only)
    ]  # fmt: skip
    if not named:
        return ""
    # The extremes are NaN where one value is, and take no copy of the weights.
    extremes_P2 = torch.stack([torch.stack(p.detach().aminmax()).float().cpu() for _, p in named])
    bad_P = ~torch.isfinite(extremes_P2).all(-1)
    return named[int(bad_P.float().argmax())][0] if bad_P.any() else ""
