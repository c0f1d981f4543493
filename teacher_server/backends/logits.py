"""What an architecture does to logits behind its output head: known ways in a table, the others found by a probe at loading.

In: a config, or logits made in two ways; out: scale and soft-cap, or how the two differ. The trainer has the same table of its own
(`student_trainer/model/logit_probe.py`): neither house imports the other.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor as Torch
from transformers import PreTrainedModel

from teacher_server.errors import ServerConfigError

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
# Largest difference of head(state) and the model's own logits, as a share of the largest logit; and of the factor between them from 1.
_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (5e-2, 1e-2), "float16": (1e-2, 2e-3)}
# Median distance of a row of states when only later tokens change, as a share of its norm. The median: rounding may send a row of a
# mixture to another expert, and who sees later tokens sees them from every row.
_CAUSAL_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
# Architectures that have the setting and no positions: state space models, and attention with linear biases or none.
_WITHOUT_POSITIONS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "bloom", "jamba")
_NO_LIMIT = 1 << 20
PROBE_TOKENS = 16


class Transform(NamedTuple):
    """logits = cap * tanh(scale * z / cap) of z = h W^T + b; a cap of 0 is none."""

    scale: float
    cap: float


def transform_of(config: Any) -> Transform:
    """What the config of an architecture says of its logits; of a multimodal one the text config is read.

    Raises:
        ServerConfigError: a divisor of 0.
    """
    scale, cap, text = 1.0, 0.0, config.get_text_config()
    for name, usual in _SENSES.items():
        value = getattr(text, name, None)
        sense = _OTHERWISE.get((config.model_type, name), usual)
        if value is None or sense == "unused":
            continue
        if sense == "over" and not value:
            raise ServerConfigError(f"the model's config.json has {name}={value}, by which its logits are divided")
        if sense == "cap":
            cap = float(value)
        else:
            scale *= float(value) if sense == "times" else 1.0 / float(value)
    return Transform(scale, cap)


def position_limit(config: Any) -> int:
    """The longest sequence that a config has positions for, rope scaling counted in; 2^20 if it knows no limit."""
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if text.model_type in _WITHOUT_POSITIONS or getattr(text, "alibi", False) or not isinstance(own, int) or own <= 0:
        return _NO_LIMIT
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    limits = [own]
    for kind in kinds:
        factor = kind.get("factor")
        if (
            factor and kind.get("rope_type", "default") != "default"
        ):  # some files give the limit after scaling, some before
            limits.append(int(float(factor) * (kind.get("original_max_position_embeddings") or own)))
    return max(limits)


def body_of(model: Any) -> Any:
    """The part of a causal model that gives states after the final norm.

    `get_decoder` gives the model itself for Llama 4 and Mllama, and the output layer for ModernBERT, which they call `decoder`.
    """
    found = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    return next((part for part in found if isinstance(part, PreTrainedModel) and part is not model), found[0])


def probe_ids(below: int) -> Torch:
    """Two sequences [2, PROBE_TOKENS] of ids that begin alike and go on differently."""
    ids_BL = torch.stack([torch.arange(PROBE_TOKENS), torch.arange(PROBE_TOKENS)]) * 7919 + 1
    ids_BL[1, PROBE_TOKENS // 2 :] += 1
    return ids_BL % below


def disagreement(own: Torch, ours: Torch, state_BLD: Torch, dtype: str) -> str:
    """What is wrong with head(state) of `probe_ids`, in words; empty if nothing is.

    Args:
        own: the model's own logits [B, L, V].
        ours: head(state) of the same.
        state_BLD: the states.
        dtype: of the model.
    """
    if own.shape != ours.shape:
        return f"its logits have the shape {list(own.shape)}, its head makes {list(ours.shape)}"
    tolerance, factor_tolerance = _TOLERANCE[dtype]
    own, ours = own.double().flatten(), ours.double().flatten()
    if not bool(own.isfinite().all()):
        return "its logits are not finite numbers (inf or NaN in the weights, or too large for its dtype)"
    largest, off = float(own.abs().max()), float((own - ours).abs().max())
    factor = float(own @ ours / (ours @ ours).clamp_min(1e-30))
    if not off <= tolerance * max(largest, 1e-30) or (largest and abs(factor - 1) > factor_tolerance):
        as_if = (
            f", as if multiplied by {factor:.6g}"
            if float((own - factor * ours).abs().max()) <= tolerance * largest
            else ""
        )
        return (
            "its logits are not its head applied to its last hidden state alone: "
            f"they differ by up to {off:.3g} where the largest is {largest:.3g} (tolerance {tolerance:g} of it){as_if}"
        )
    one, other = state_BLD[:, : PROBE_TOKENS // 2].double()
    apart = float(((one - other).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-30)).median())
    if not apart <= _CAUSAL_TOLERANCE[dtype]:
        return f"it sees tokens that come later (states of the same tokens differ by {apart:.2g} of their size); it is no causal language model"
    return ""
