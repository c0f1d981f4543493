"""What an architecture does to logits behind its output head, and whether that is all: known ways in a table, the others found by a probe.

In: a loaded model, its states and its head; out: the scale and soft-cap of its logits, or a refusal by name before anything is trained.
The server has the same table of its own (`teacher_server/backends/logits.py`): neither house imports the other.
Axes: B sequences, L tokens, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_trainer.errors import ModelError
from student_trainer.losses.head import Head

Sense = Literal["times", "over", "cap", "unused"]

# Settings that say what happens to h W^T + b, as most architectures read them.
_SENSES: dict[str, Sense] = {
    "logit_scale": "times",  # Cohere, Cohere 2
    "lm_head_multiplier": "times",  # Falcon-H1
    "logits_scaling": "over",  # Granite and its mixtures, MiniCPM 3
    "logits_mup_width_multiplier": "over",  # Inkling
    "final_logit_softcapping": "cap",  # Gemma 2 to 4, nanochat, VaultGemma
    "logits_soft_cap": "cap",  # RecurrentGemma
    "output_logit_soft_cap": "cap",  # xLSTM
}
# Architectures that read one of these otherwise.
_OTHERWISE: dict[tuple[str, str], Sense] = {
    ("hyperclovax", "logits_scaling"): "times",
    ("mpt", "logit_scale"): "unused",  # transformers' MPT has the setting and no such line
    (
        "gemma3",
        "final_logit_softcapping",
    ): "unused",  # only Gemma3ForCausalLM (gemma3_text) has it, the multimodal class has not
}
_TOKENS = 16
# Largest difference of head(state) and the model's own logits, as a share of the largest logit; and of the factor between them from 1.
_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (5e-2, 1e-2), torch.float16: (1e-2, 2e-3)}
# Median distance of a row of states when only later tokens change, as a share of its norm. The median: rounding may send a row of a
# mixture to another expert, and who sees later tokens sees them from every row.
_CAUSAL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Transform(NamedTuple):
    """logits = cap * tanh(scale * z / cap) of z = h W^T + b; a cap of 0 is none."""

    scale: float
    cap: float


def transform_of(config: Any) -> Transform:
    """What the config of an architecture says of its logits.

    Args:
        config: of the whole model; of a multimodal one the text config is read.

    Raises:
        ModelError: a divisor of 0.
    """
    scale, cap, text = 1.0, 0.0, config.get_text_config()
    for name, usual in _SENSES.items():
        value = getattr(text, name, None)
        sense = _OTHERWISE.get((config.model_type, name), usual)
        if value is None or sense == "unused":
            continue
        if sense == "over" and not value:
            raise ModelError(f"the model's config.json has {name}={value}, by which its logits are divided")
        if sense == "cap":
            cap = float(value)
        else:
            scale *= float(value) if sense == "times" else 1.0 / float(value)
    return Transform(scale, cap)


def check_logits(
    model: Any,
    logits: Callable[[Tensor], Tensor],
    states: Callable[[Tensor], Tensor],
    head: Head,
    path: str,
    dtype: torch.dtype,
) -> None:
    """Compares head(states(x)) with the model's own logits of two short sequences, which must also see nothing of what comes later.

    The model's mode and torch's random state are left as they are; nothing is compiled and no gradient kept.

    Args:
        model: transformers' causal model, with or without adapters in its layers.
        logits: ids [B, L] -> logits [B, L, V], the model's own.
        states: ids [B, L] -> states [B, L, D], as training computes them.
        head: over all rows.
        path: model.path, for messages.
        dtype: that the model computes in.

    Raises:
        ModelError: naming architecture, difference and what to do.
    """
    kind = f"model.path {path}: {type(model).__name__} (model_type {model.config.get_text_config().model_type})"
    device = head.weight_VD.device
    ids_BL = _probe_ids(min(head.vocab_rows, embedding_rows(model))).to(device)
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            model.eval()
            state_BLD = states(ids_BL)
            own_BLV = logits(ids_BL)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code, which raises what it likes
        raise ModelError(
            f"{kind} cannot be asked for its logits by token ids alone: {type(error).__name__}: {str(error)[:200]}; "
            "it cannot be trained here"
        ) from error
    finally:
        model.train(was_training)
    if own_BLV.shape != (*ids_BL.shape, head.vocab_rows):
        raise ModelError(
            f"{kind} gives logits of shape {list(own_BLV.shape)} where its output head makes {[*ids_BL.shape, head.vocab_rows]}; "
            "it cannot be trained here"
        )
    if state_BLD.shape != (*ids_BL.shape, head.weight_VD.shape[1]):
        raise ModelError(
            f"{kind} has states of shape {list(state_BLD.shape)} behind its last layer where its output head reads "
            f"{[*ids_BL.shape, head.weight_VD.shape[1]]}; it cannot be trained here"
        )
    with torch.no_grad():
        ours_BLV = head.logits(state_BLD.flatten(0, 1)).view(own_BLV.shape)
    said = disagreement(own_BLV, ours_BLV, *_TOLERANCE.get(dtype, _TOLERANCE[torch.float32]))
    if said:
        raise ModelError(
            f"{kind} does not make its logits by its output head from its last hidden state alone: {said}; training would follow wrong "
            "logits, so this architecture is refused (what it does there can be added to student_trainer/model/logit_probe.py)"
        )
    half = _TOKENS // 2
    one, other = state_BLD[:, :half].double()
    off = float(((one - other).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-30)).median())
    if not off <= _CAUSAL_TOLERANCE.get(dtype, 1e-4):
        raise ModelError(
            f"{kind} sees tokens that come later: its states of the same {half} tokens differ by {off:.2g} of their size when others "
            "follow; it is no causal language model as configured (is_decoder?)"
        )


def disagreement(own: Tensor, ours: Tensor, tolerance: float, factor_tolerance: float) -> str:
    """How two sets of logits differ, in words; empty if they do not.

    Args:
        own, ours: of any equal shape.
        tolerance: of the largest difference, as a share of the largest logit.
        factor_tolerance: of the factor that fits best between them, from 1; rounding hardly moves it, a forgotten multiplier does.
    """
    own, ours = own.double().flatten(), ours.double().flatten()
    if not bool(own.isfinite().all()):
        return "they are not finite numbers (inf or NaN in the weights, or too large for its dtype)"
    largest = float(own.abs().max())
    off = float((own - ours).abs().max())
    factor = float(own @ ours / (ours @ ours).clamp_min(1e-30))
    if off <= tolerance * max(largest, 1e-30) and (abs(factor - 1) <= factor_tolerance or largest == 0):
        return ""
    rest = float((own - factor * ours).abs().max())
    as_if = f", as if multiplied by {factor:.6g}" if rest <= tolerance * largest else ""
    return f"they differ by up to {off:.3g} where the largest is {largest:.3g} (tolerance {tolerance:g} of it){as_if}"


def body_of(model: Any) -> Any:
    """The part of a causal model that gives states after the final norm.

    `get_decoder` gives the model itself for Llama 4 and Mllama, and the output layer for ModernBERT, which they call `decoder`.
    """
    found = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    return next((part for part in found if isinstance(part, PreTrainedModel) and part is not model), found[0])


def embedding_rows(model: Any) -> int:
    """Ids that the input embedding has rows for; where it is no plain layer, those of the head."""
    rows = [
        layer.weight.shape[0]
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if hasattr(layer, "weight")
    ]
    return int(rows[0])


def _probe_ids(below: int) -> Tensor:
    """Two sequences [2, L] that begin alike and go on differently."""
    ids_BL = torch.stack([torch.arange(_TOKENS), torch.arange(_TOKENS)]) * 7919 + 1
    ids_BL[1, _TOKENS // 2 :] += 1
    return ids_BL % below
