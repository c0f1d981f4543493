"""Decoder layers as compiled functions, gradient checkpointing inside: norms, rotations, gates and casts fused, half the kernels.

In: a model whose layers are transformers'; out: the same modules, parameters and names, which while they train compute the same but for
rounding. Measuring and writing stay as they were. One graph serves all layers of a kind and all lengths, so that what a batch is computed
by does not depend on those before it: a resumed run goes by the same kernels.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import cpu_vec_isa
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from student_trainer.errors import ModelError

log = logging.getLogger(__name__)
_RUN = "_compiled_run"  # of a layer: its `_Run`


def install(model: nn.Module, backend: Any = "inductor", *, required: bool = True) -> int:
    """Gives every decoder layer of `model` a compiled forward for training; returns how many have one.

    Args:
        model: a causal language model of transformers, with or without adapters.
        backend: of torch.compile; others than the default are for tests.
        required: layers that turn out not to compile are an error (ModelError, at the step where that shows), not a warning and run plainly.
    """
    options = _vector_width() if backend == "inductor" and not next(model.parameters()).is_cuda else None
    run = _Run(torch.compile(_run, backend=backend, dynamic=True, options=options), required)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    plain = [layer for layer in layers if not isinstance(layer, _Compiled)]
    for layer in plain:
        layer.__class__ = _compiled_class(type(layer))  # type: ignore[arg-type]
        layer.__dict__[_RUN] = run
    return len(layers)


def _vector_width() -> dict[str, Any]:
    """Says which vectors the compiler is to use, those that it would have chosen, so that its cache on disk is keyed by them.

    Without it torch (2.13) takes loops that it has once made for vectors of 8 floats out of the cache and compiles them for those of 16 when
    ATEN_CPU_CAPABILITY or the processor has changed, and they write beyond the ends of their tensors.
    """
    return {"cpp.simdlen": cpu_vec_isa.pick_vec_isa().bit_width()}


def uninstall(model: nn.Module) -> None:
    """Takes `install` back."""
    for module in model.modules():
        if isinstance(module, _Compiled):
            module.__class__ = module.plain_kind  # type: ignore[assignment]
            del module.__dict__[_RUN]


def is_installed(model: nn.Module) -> bool:
    """Whether layers of `model` have a compiled forward."""
    return any(isinstance(module, _Compiled) for module in model.modules())


class _Run:
    """The compiled function, and whether it can be compiled here."""

    def __init__(self, run: Any, required: bool) -> None:
        self._run = run
        self._required = required
        self._proven = False
        self.works = True

    def __call__(
        self, plain: Any, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            if self._proven:  # patching takes time of a host that has none to spare
                return self._run(layer, hidden, args, kwargs)
            # The way back is compiled now, so that what cannot be shows here and not in the middle of a backward pass.
            # Scalings are constants: taken for variables under dynamic=True, they make torch compile everything a second time.
            with (
                functorch_config.patch(force_non_lazy_backward_lowering=True),
                dynamo_config.patch(specialize_float=True),
            ):
                output = self._run(layer, hidden, args, kwargs)
            self._proven = True
            return output
        except (TorchDynamoException, _GivenUpError) as error:
            if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
                raise
            said = " ".join(str(error).split())[:200]
            if self._required:
                raise ModelError(
                    f"model.compiled=true: the layers cannot be compiled here ({said}); set it to auto or false"
                ) from error
            self.works = False
            log.warning("the student's layers cannot be compiled and are run as they are, which is slower: %s", said)
            return plain(layer, hidden, *args, **kwargs)


class _GivenUpError(RuntimeError):
    """torch runs the function as it is."""


class _Compiled:
    """A class that `install` makes; `plain_kind` is the layer's own."""

    plain_kind: type[nn.Module]


@functools.cache
def _compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """One for all layers and all models: the compiler keeps a graph for each class it meets, and eight at most."""

    def call(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self.__dict__[_RUN]
        if not (self.training and run.works):
            return kind.__call__(self, hidden, *args, **kwargs)
        return run(kind.__call__, self, hidden, args, kwargs)

    return type(kind.__name__, (_Compiled, kind), {"__call__": call, "plain_kind": kind, "__module__": kind.__module__})


def _run(layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.compiler.is_compiling():
        raise _GivenUpError("torch is told not to compile, or has met more kinds of calls than it keeps graphs for")
    if not layer.gradient_checkpointing:
        return nn.Module.__call__(layer, hidden, *args, **kwargs)
    forward = functools.partial(nn.Module.__call__, layer)
    return checkpoint(forward, hidden, *args, use_reentrant=False, context_fn=_keep_attention, **kwargs)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What attention gives is kept, one [B, L, D] a layer; all else is computed again.

    To the compiler every attention might draw random numbers (torch tags it `nondeterministic_seeded`, with or without dropout); computed
    twice, it would save and restore the generator's state around it, which no recording (`speed/cuda_graphs.py`) can hold.
    """
    draws = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
    is_kept = draws and "attention" in str(op)  # not dropout: its outputs are as large as all that checkpointing saves
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
