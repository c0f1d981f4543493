"""A student as shapes: its parameters counted, and its blocks' activations traced, on the meta device.

In: the section `model`; out: `Shapes`, which answers for any number of sequences. Reads config files and never a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model import adapters, internlm, logit_probe
from student_trainer.model.forward import blocks_of
from student_trainer.planning.estimate import blocks
from student_trainer.planning.estimate.blocks import BlockBytes, Kind

_BLOCK_WEIGHTS = 64  # weights of a 4-bit layer that share a scale
_NESTED = 256  # scales that share a scale of their own, where they are kept in 8 bit


@dataclass(frozen=True)
class Activations:
    """Bytes of a pass over a number of sequences.

    Attributes:
        base: of what stands around the blocks: the final norm, rotations.
        kinds: of one block of each kind, and how many of these there are.
    """

    base: BlockBytes
    kinds: tuple[tuple[BlockBytes, int], ...]


@dataclass
class Shapes:
    """What a student holds.

    Attributes:
        frozen_bytes: of weights that are not trained, 4-bit ones as they lie in memory, and buffers.
        trained: numbers that are trained, all of them float32.
        tensors: trained tensors; AdamW keeps a step count for each.
        head_rows, width: of the output head.
        trains_head: whether the head's weight is trained.
        ties_head: whether it is the embedding.
        largest: numbers of the largest trained tensor.
        dequantized_bytes: of the largest 4-bit layer's weight while it is multiplied by; 0 without such layers.
        blocks: how many there are.
    """

    frozen_bytes: int
    trained: int
    tensors: int
    head_rows: int
    width: int
    trains_head: bool
    ties_head: bool
    largest: int
    dequantized_bytes: int
    blocks: int
    _model: Any
    _narrowed: torch.dtype | None
    _traced: dict[int, tuple[tuple[BlockBytes, BlockBytes], list[tuple[BlockBytes, BlockBytes, int]]]] = field(
        default_factory=dict
    )

    _mode: Any = None  # under which the model's tensors have no memory, once it has been traced

    @property
    def computed_bytes(self) -> int:
        """Of a number in a pass."""
        return (self._narrowed or next(self._model.parameters()).dtype).itemsize

    def activations(self, sequences: int, length: int) -> Activations:
        """Of a pass over [sequences, length]; each length is traced once.

        Raises:
            ModelError: the architecture cannot be traced, with torch's words.
        """
        if length not in self._traced:
            try:
                self._traced[length] = self._trace(length)
            except ModelError:
                raise
            except Exception as error:  # whatever an architecture does that fake tensors cannot
                told = " ".join(str(error).split())[:200]
                raise ModelError(
                    f"the activations of {type(_causal(self._model)).__name__} cannot be estimated: {type(error).__name__}: {told}"
                ) from error
        base, kinds = self._traced[length]
        around = base[0].at(base[1], sequences)
        return Activations(around, tuple((one.at(two, sequences), count) for one, two, count in kinds))

    def _trace(self, length: int) -> tuple[tuple[BlockBytes, BlockBytes], list[tuple[BlockBytes, BlockBytes, int]]]:
        model, body = self._model, logit_probe.body_of(_causal(self._model))

        def of(kind: Kind | None) -> tuple[BlockBytes, BlockBytes]:
            one, two = (blocks.trace(model, body, kind, count, length, self._narrowed) for count in (1, 2))
            return one, two

        if self._mode is None:
            self._mode = blocks.fake(model)
        with self._mode:
            alone = blocks.trace(model, body, None, 1, length, self._narrowed)
            base, found = (alone, alone.scaled(2)), []  # a norm keeps nothing that does not grow with the sequences
            for kind in blocks.kinds_of(body):
                one, two = of(kind)
                found.append((one.less(base[0]), two.less(base[1]), kind.count))
        return base, found


def load_shapes(config: ModelConfig, *, bfloat16: bool, autocast: bool = False) -> Shapes:
    """The student that `config` describes.

    Args:
        config: which one, and how it is trained.
        bfloat16: whether the device multiplies bfloat16, so that float32 weights that are trained whole compute in it.
        autocast: whether passes are narrowed to it in any case (`train.bf16`).

    Raises:
        ModelError: a config that cannot be read, or adapters that do not fit.
    """
    sources = adapters.find(config)
    internlm.register()
    try:
        model_config = AutoConfig.from_pretrained(sources.model, revision=sources.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path {config.path}: cannot be read: {str(error)[:300]}") from error
    if config.lora is not None and sources.adapter is not None:
        config = config.model_copy(update={"lora": _shape_of(sources.adapter.settings, config.lora)})
    return shapes_of(model_config, config, bfloat16=bfloat16, autocast=autocast)


def shapes_of(model_config: Any, config: ModelConfig, *, bfloat16: bool, autocast: bool = False) -> Shapes:
    """As `load_shapes`, of a model's config that is at hand."""
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    attention = "eager" if capped or config.attention == "eager" else "sdpa"
    dtype = getattr(torch, config.dtype) if config.lora else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
        # Without the padding of names that checkpointing needs: what it keeps is counted by `parts`.
        adapted = adapters.adapt(model, config.model_copy(update={"gradient_checkpointing": False}), None)
    causal = _causal(adapted)
    parameters = list(adapted.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad) + sum(b.nbytes for b in adapted.buffers())
    dequantized = 0
    if (quantize := getattr(config, "quantize", None)) is not None:
        linear = [
            m.weight
            for m in logit_probe.body_of(causal).modules()
            if type(m) is nn.Linear and not m.weight.requires_grad
        ]
        frozen -= sum(w.nbytes - _packed(w.numel(), bool(getattr(quantize, "double", True))) for w in linear)
        dequantized = max((w.nbytes for w in linear), default=0)
    head = getattr(causal.get_output_embeddings(), "base_layer", causal.get_output_embeddings()).weight
    embedding = causal.get_input_embeddings()
    is_narrowed = config.lora is None and config.dtype == "bfloat16" and bfloat16
    narrowed = torch.bfloat16 if is_narrowed or (autocast and config.dtype == "float32") else None
    return Shapes(
        frozen, sum(p.numel() for p in trained), len(trained), head.shape[0], head.shape[1], head.requires_grad,
        head is getattr(embedding, "base_layer", embedding).weight, max((p.numel() for p in trained), default=0), dequantized,
        len(blocks_of(logit_probe.body_of(causal))), adapted, narrowed,
    )  # fmt: skip


def _packed(weights: int, double: bool) -> int:
    """Bytes of a 4-bit weight: half a byte each and float32 scales of 64, or these in 8 bit with scales of their own."""
    scales = -(-weights // _BLOCK_WEIGHTS)
    return weights // 2 + (scales + 4 * -(-scales // _NESTED) if double else 4 * scales)


def _shape_of(settings: dict[str, Any], lora: LoraSettings) -> LoraSettings:
    """The settings by which training goes on with an adapter: its own."""
    targets = settings.get("target_modules", lora.target_modules)
    named = targets if isinstance(targets, str) else tuple(targets)
    return lora.model_copy(update={"rank": int(settings.get("r", lora.rank)), "target_modules": named})


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
