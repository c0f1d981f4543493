"""The demo's teacher: a small language model trained from nothing on the training rows, and kept by the hash of its recipe.

A stand-in for the pretrained model a user would bring; a plain loop, so that it can be read in one go.
In: rows as the student will see them; out: a model folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .models import SIZES, ModelSize, write_model

REVISION = 2  # of the loop below: raised when the same recipe makes other weights
BUCKET = 8  # batches sorted by length together: less padding, order still mixed


@dataclass(frozen=True)
class TeacherRecipe:
    """Everything that decides the teacher's weights, beside the data and the tokenizer.

    Attributes:
        muon_lr: of matrices (Muon, Jordan et al. 2024): in 300 steps it reached 1.25 nats per byte where AdamW
            reached 1.37, for 40 % more time a step.
        adam_lr: of embeddings and norms.
    """

    size: ModelSize = SIZES["teacher"]
    steps: int = 400
    batch_size: int = 16
    muon_lr: float = 0.02
    adam_lr: float = 6e-3
    warmup: int = 20
    seed: int = 0

    def digest(self, data: Path, tokenizer: Path) -> str:
        """Names the result: loop, recipe, data and tokenizer."""
        digest = hashlib.sha256(json.dumps([REVISION, asdict(self)], sort_keys=True).encode())
        for file in (data, tokenizer / "tokenizer.json"):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


def train_teacher(
    cache: Path, data: Path, tokenizer: Path, examples: Any, recipe: TeacherRecipe, console: Console
) -> Path:
    """The teacher's folder, from the cache if this very teacher is there.

    Args:
        cache: where teachers are kept.
        data, tokenizer: what `examples` were made from.
        examples: a TokenizedDataset; every token is learned, not only the targets.
        recipe: how to train.
        console: for the progress bar.
    """
    folder = cache / f"teacher-{recipe.digest(data, tokenizer)}"
    if (folder / "model.safetensors").is_file():
        console.print(f"teacher: taken from {folder}")
        return _link(cache / "teacher", folder)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from .muon import Muon

    start = cache / "teacher-start"
    parameters = write_model(start, tokenizer, recipe.size, recipe.seed)
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        (Muon(matrices, lr=recipe.muon_lr, weight_decay=0.05, momentum=0.95), recipe.muon_lr),
        (torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0), recipe.adam_lr),
    ]
    columns = (
        TextColumn("[bold]teacher"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=recipe.steps, loss="")
        for step, rows in zip(range(recipe.steps), _batches(examples, recipe), strict=False):
            loss = _loss(model, rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * _share(step, recipe)
                optimizer.step()
                optimizer.zero_grad()
            progress.update(task, advance=1, loss=f"loss {loss.item():.3f} nats/token")
            if not console.is_terminal and (step + 1) % 100 == 0:
                console.print(f"teacher: step {step + 1}/{recipe.steps}, loss {loss.item():.3f} nats/token")
    partial = cache / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(start, partial)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    console.print(f"teacher: {parameters:,} parameters trained, kept in {folder}")
    return _link(cache / "teacher", folder)


def _link(link: Path, folder: Path) -> Path:
    """Makes `link` the name of the current teacher, which the example configs use; returns the folder."""
    fresh = link.with_name(f"{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)
    return folder


def _loss(model: Any, rows: list[Any]) -> Any:
    """Mean cross-entropy over every next token of right-padded rows."""
    import torch

    longest = max(row.token_ids.size for row in rows)
    ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BL = torch.full((len(rows), longest), -100)
    for index, row in enumerate(rows):
        tokens = torch.from_numpy(row.token_ids.astype(np.int64))
        ids_BL[index, : tokens.numel()] = tokens
        labels_BL[index, : tokens.numel()] = tokens
    logits_BLV = model(input_ids=ids_BL).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BLV.reshape(-1, logits_BLV.shape[-1]), labels_BL[:, 1:].reshape(-1))


def _batches(examples: Any, recipe: TeacherRecipe) -> Iterator[list[Any]]:
    """Endless batches of rows of similar length, in an order that the seed decides."""
    generator = np.random.default_rng(recipe.seed)
    span = recipe.batch_size * BUCKET
    while True:
        order = generator.permutation(len(examples))
        for start in range(0, len(order) - span + 1, span):
            near = sorted(order[start : start + span], key=lambda index: examples[index].example.token_ids.size)
            for batch in generator.permutation(BUCKET):
                chosen = near[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
                yield [examples[index].example for index in chosen]


def _share(step: int, recipe: TeacherRecipe) -> float:
    """Warm-up, then a cosine down to 5 % of the peak."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
