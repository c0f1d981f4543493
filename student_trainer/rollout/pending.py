"""Rollouts in a checkpoint: those of steps to come whose weights are gone, so that a resumed run learns from the same.

In: rollouts by step; out: `rollouts.safetensors`, numbers and a JSON header, no pickle. Prompts are not in it: they follow from the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from student_trainer.errors import RunError
from student_trainer.rollout.sample import Rollout, RolloutFailure, RolloutPrompt
from student_trainer.rollout.writer import Written

PENDING_NAME = "rollouts.safetensors"


def save_pending(folder: Path, pending: Mapping[int, Written]) -> None:
    """Writes them into the folder of a checkpoint."""
    steps, ids, logp, likeliest = [], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], []
    for step, written in sorted(pending.items()):
        told: list[dict[str, Any]] = []
        for one in written:
            if isinstance(one, RolloutFailure):
                told.append({"key": one.prompt.key, "why": one.why})
                continue
            told.append(
                {"key": one.prompt.key, "tokens": one.token_ids.size, "finished": one.finished, "version": one.version}
            )
            ids.append(one.token_ids.astype(np.int32))
            logp.append(one.logp_n.astype(np.float32))
            if one.likeliest_nM is not None:
                likeliest.append(one.likeliest_nM.astype(np.int32))
        steps.append({"step": step, "rollouts": told})
    tensors = {"token_ids_n": np.concatenate(ids), "logp_n": np.concatenate(logp)}
    if likeliest:
        tensors["likeliest_nM"] = np.concatenate(likeliest)
    save_file(tensors, str(folder / PENDING_NAME), metadata={"steps": json.dumps(steps)})


def load_pending(folder: Path, prompts: Callable[[int], list[RolloutPrompt]]) -> dict[int, Written]:
    """Those of a checkpoint, by step.

    Args:
        folder: the checkpoint.
        prompts: step -> prompts of its rollouts, in order.

    Raises:
        RunError: the file is missing or damaged, or of other rows.
    """
    path = folder / PENDING_NAME
    try:
        with safe_open(str(path), "np") as file:
            steps = json.loads(file.metadata()["steps"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        found, start = {}, 0
        for entry in steps:
            written: Written = []
            for prompt, told in zip(prompts(entry["step"]), entry["rollouts"], strict=True):
                if told["key"] != prompt.key:
                    raise ValueError(
                        f"step {entry['step']} has a rollout of {told['key']!r}, the rows have {prompt.key!r} there"
                    )
                if "why" in told:
                    written.append(RolloutFailure(prompt, told["why"]))
                    continue
                part = slice(start, start := start + told["tokens"])
                likeliest = tensors["likeliest_nM"][part] if "likeliest_nM" in tensors else None
                written.append(
                    Rollout(
                        prompt,
                        tensors["token_ids_n"][part],
                        tensors["logp_n"][part],
                        told["finished"],
                        told["version"],
                        likeliest,
                    )
                )
            found[int(entry["step"])] = written
        if start != tensors["token_ids_n"].size:
            raise ValueError(f"it has {tensors['token_ids_n'].size} tokens, its header says {start}")
        return found
    except Exception as error:  # safetensors has an error class of its own
        raise RunError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
