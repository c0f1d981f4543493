"""AWQ: weights in 4 bits, calibrated on rows, by llm-compressor (extra `export`), in the format that vLLM reads as it is.

In: a merged folder and rows; out: a folder. llm-compressor holds another transformers than the trainer's newest, so it may need an
environment of its own; it is imported when it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_trainer.errors import ModelError

_GROUPS = (128, 64, 32)  # that vLLM's kernels know
_LEFT_ALONE = ["lm_head", "re:.*mlp\\.gate$", "re:.*router.*", "re:.*block_sparse_moe\\.gate$"]


def check_awq() -> None:
    """Refuses where llm-compressor is not installed, or there is no GPU: its AWQ asks for one while it smooths (seen with 0.14.0.1).

    Raises:
        ModelError: with the line that installs it, or the way without a GPU.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise ModelError(
            "--format awq: llmcompressor is not installed here: pip install 'lyceum-distill[export]' (llmcompressor 0.14 holds transformers 5.17: best in "
            "an environment of its own)"
        )
    import torch

    if not torch.accelerator.is_available():
        raise ModelError(
            "--format awq: llm-compressor quantises on a GPU, and this machine has none; --format merged is served as it is"
        )


def write_awq(merged: Path, folder: Path, rows: Sequence[Sequence[int]]) -> None:
    """Quantises the linear layers of a merged model to 4 bits with zero points, in groups of the largest size that divides them all.

    Args:
        merged: folder of the model.
        folder: where to.
        rows: token ids to calibrate on.

    Raises:
        ModelError: a model that llm-compressor cannot quantise.
    """
    check_awq()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    from student_trainer.export.merged import load_plain

    model = load_plain(merged)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=_group(model, merged)
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=_LEFT_ALONE)]
    data = Dataset.from_list([{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in rows])
    try:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=max(map(len, rows)),
            num_calibration_samples=len(rows),
            save_compressed=True,
        )
        model.save_pretrained(folder, save_compressed=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"--format awq: llm-compressor cannot quantise {type(model).__name__}: {str(error)[:300]}"
        ) from error


def _group(model: Any, merged: Path) -> int:
    import torch

    head = model.get_output_embeddings()
    widths = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    found = next((size for size in _GROUPS if all(width % size == 0 for width in widths)), None)
    if found is None:
        raise ModelError(
            f"--format awq: {merged.name} has layers of {min(widths)} inputs, and groups of {', '.join(map(str, _GROUPS))} do not divide them"
        )
    return found
