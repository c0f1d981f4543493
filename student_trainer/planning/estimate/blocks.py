"""What autograd keeps of one decoder block, found by running the block on tensors that have shapes and no memory.

In: a model on the meta device; out: bytes per kind of block, for a number of sequences of one length. The operations are the
model's own, so that an architecture needs no formula of its own here. Must never allocate: tensors are torch's fake ones.

Axes: B sequences, L padded length, D width.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from student_trainer.model.forward import blocks_of, run_body

# Operations that a compiler calls from libraries instead of making them a part of its own kernels: it keeps what goes in and comes out.
_CALLED = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product", "linear", "embedding", "index")


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block in a pass over [B, L].

    Attributes:
        saved: what autograd keeps until the backward pass, each operation run by itself.
        kept: the same where the block is one compiled function: inputs and outputs of matrix products and of attention, and what
            norms read. Elementwise results are made again.
        entry: the block's input, which is all that gradient checkpointing keeps.
        attention: output and log-sum-exp of attention, which compiled layers keep under checkpointing too.
        passing: gradients and intermediate results of the backward pass, at most, beside what was kept.
    """

    saved: int
    kept: int
    entry: int
    attention: int
    passing: int

    def at(self, double: BlockBytes, sequences: int) -> BlockBytes:
        """Of `sequences` sequences, if this is of one and `double` of two: a line, whose constant are casts of weights."""
        pairs = zip(vars(self).values(), vars(double).values(), strict=True)
        return BlockBytes(*(max(0, one + (two - one) * (sequences - 1)) for one, two in pairs))

    def scaled(self, times: int) -> BlockBytes:
        """Of `times` as many sequences, where nothing is there that does not grow with them."""
        return BlockBytes(*(value * times for value in vars(self).values()))

    def less(self, base: BlockBytes) -> BlockBytes:
        """Of the block alone, if `base` is of the body without it; `passing` is a maximum and stays."""
        return BlockBytes(
            self.saved - base.saved, self.kept - base.kept, self.entry, self.attention - base.attention, self.passing
        )


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike.

    Attributes:
        first: index of the first such block.
        count: how many there are.
    """

    first: int
    count: int


def kinds_of(body: Any) -> list[Kind]:
    """The model's blocks, grouped by class and shapes of parameters."""
    groups: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks_of(body)):
        signature = type(block), tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
        groups.setdefault((signature, getattr(block, "attention_type", None)), []).append(index)
    return [Kind(indices[0], len(indices)) for indices in groups.values()]


def trace(
    model: nn.Module, body: Any, kind: Kind | None, sequences: int, length: int, narrowed: torch.dtype | None
) -> BlockBytes:
    """Bytes of the body with one block of a kind, or with none, in a pass forth and back over [sequences, length].

    Args:
        model: on fake tensors (`fake`), in training mode; `body` is its part that makes states.
        narrowed: dtype that float32 weights compute in by autocast; None for their own.
    """
    blocks = blocks_of(body)
    held = dict(blocks._modules)
    count = body.config.get_text_config().num_hidden_layers
    try:
        blocks._modules.clear()
        if kind is not None:
            blocks._modules["0"] = held[str(kind.first)]
        body.config.get_text_config().num_hidden_layers = len(blocks)
        # The embedding's own gradient is as large as the embedding and comes after all blocks: `parts` counts it.
        alone = body.get_input_embeddings().register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
        try:
            return _traced(model, body, sequences, length, narrowed)
        finally:
            alone.remove()
    finally:
        blocks._modules.clear()
        blocks._modules.update(held)
        body.config.get_text_config().num_hidden_layers = count


def _traced(model: nn.Module, body: Any, sequences: int, length: int, narrowed: torch.dtype | None) -> BlockBytes:
    ids_BL = torch.empty((sequences, length), dtype=torch.long)
    lasting = {_key(tensor) for tensor in (*model.parameters(), *model.buffers(), ids_BL)}
    norms = _count_norms(body)
    seen: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in lasting:
            seen[_key(tensor)] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    ops = _Operations()
    with _narrowing(narrowed), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), ops:
        states_BLD = run_body(body, ids_BL).final_BLD
    saved = sum(size for _, size in seen.values())
    width, stream = states_BLD.shape[-1], states_BLD.element_size()
    computed = stream if narrowed is None else narrowed.itemsize
    kept: dict[Any, int] = {}
    for key, (_, size) in seen.items():
        if key in ops.called:
            kept[ops.cast_of.get(key, key)] = size
    tokens = sequences * length
    read_by_norms = tokens * width * (stream + max(0, norms - 1) * computed) if len(blocks_of(body)) else 0
    attention = sum(size for key, (_, size) in seen.items() if key in ops.attention)
    seen.clear()
    del states_BLD
    ops.clear()
    passing = _passing(model, lambda: run_body(body, ids_BL).final_BLD, narrowed)
    return BlockBytes(saved, sum(kept.values()) + read_by_norms, tokens * width * stream, attention, passing)


def _passing(model: nn.Module, run: Callable[[], Tensor], narrowed: torch.dtype | None) -> int:
    """Bytes above those kept, at most, while the backward pass runs; gradients of parameters leave as they come."""
    with contextlib.ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(_drop).remove)
        live = _Live()
        with live:
            with _narrowing(narrowed):
                states_BLD = run()
            grad_BLD = torch.empty_like(states_BLD)
            before = live.now
            live.most = before
            if states_BLD.requires_grad:
                states_BLD.backward(grad_BLD)
        return live.most - before


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def fake(model: nn.Module) -> FakeTensorMode:
    """Gives a model on the meta device parameters that claim to lie on the CPU and have no memory; it is run under what this returns.

    The CPU, since a build of torch without CUDA cannot run autograd on tensors that claim to be elsewhere; the bytes are the same.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
        model.train()
    return mode


@contextlib.contextmanager
def _narrowing(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype, cache_enabled=False):  # as `Student.computing` has it
        yield


def _count_norms(body: Any) -> int:
    """Norms over the whole width of the blocks that are in the body now."""
    width = body.config.get_text_config().hidden_size
    return sum(
        1
        for block in blocks_of(body)
        for name, module in block.named_modules()
        if "norm" in name.rpartition(".")[2].lower() and getattr(module, "weight", torch.empty(0)).shape == (width,)
    )


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Operations(TorchDispatchMode):
    """Notes which storages go into or come out of library calls; holds all of them, so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[int] = set()
        self.attention: set[int] = set()
        self.cast_of: dict[int, tuple[int, torch.dtype]] = {}  # of a cast: its source and its dtype
        self._held: list[Any] = []

    def clear(self) -> None:
        """Lets go of the storages."""
        self._held.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._held += [tensor.untyped_storage() for tensor in (*given, *made)]
        if name.startswith(_CALLED):
            self.called |= {_key(tensor) for tensor in (*given, *made)}
        if name.startswith("_scaled_dot_product"):
            self.attention |= {_key(tensor) for tensor in made}
        if name == "_to_copy":
            self.cast_of[_key(made[0])] = _key(given[0]), made[0].dtype
        return result


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and somebody still holds.

    Attributes:
        now: of those that live.
        most: that lived at once since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._ids: set[int] = set()
        gc.collect()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if id(storage) in known or id(storage) in self._ids:
                continue
            self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._ids.add(id(storage))
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, id(storage), size).atexit = False

    def _free(self, number: int, size: int) -> None:
        self._ids.discard(number)
        self.now -= size
