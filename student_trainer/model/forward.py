"""A pass of the student: the states that its head reads, and on request the outputs of single blocks.

In: token ids; out: `StudentOutputs`. The body runs without its output head: logits are made in chunks inside the loss. A block's output is
tapped from outside its call, so that compiled layers, recorded passes and gradient checkpointing stay as they are. What enters its FFN's
`down_proj` is inside: a block that is tapped there runs as it is, not compiled, in recorded passes too.
Must never change what a pass computes: with taps and without, the same bits.

Axes: B sequences, L padded length, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from student_trainer.data.row_packing import RowPacking
from student_trainer.errors import ModelError
from student_trainer.losses.features import ffn
from student_trainer.losses.term import FfnTap, StudentOutputs, Tap, block_of


class StudentForward(Protocol):
    """A pass, computed anew (`Student.forward`) or replayed (`speed.cuda_graphs.GraphedBody`)."""

    def __call__(self, input_ids_BL: Tensor, taps: Sequence[Tap] = ()) -> StudentOutputs:
        """See `run_body`."""


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Rows that hold several sequences each (`data.row_packing`), on the student's device.

    Attributes:
        sequence_BL: int64; a token sees those before it that have its number.
        position_BL: int64, of each token in its own sequence.
    """

    sequence_BL: Tensor
    position_BL: Tensor

    @classmethod
    def of(cls, packing: RowPacking, device: torch.device) -> SharedRows:
        """On a device."""
        return cls(torch.from_numpy(packing.sequence_RL).to(device), torch.from_numpy(packing.position_RL).to(device))


def run_body(
    body: Any, input_ids_BL: Tensor, taps: Sequence[Tap] = (), shared: SharedRows | None = None
) -> StudentOutputs:
    """States of right-padded sequences, with gradients if they are on.

    No mask is needed, since attention is causal: a token sees nothing of what stands behind it. And without one the fast
    kernels run, and nobody reads a mask back from the device.

    Args:
        body: the part of a causal model that makes states.
        input_ids_BL: int64, on the body's device.
        taps: numbers of blocks, 1 for the first; 0 for the embedding; or `FfnTap`.
        shared: which sequences share the rows; None where each row is one. With it attention has a mask, made by transformers.

    Raises:
        ModelError: an architecture whose blocks cannot be tapped, or a number that is none of them.
    """
    taken: dict[Tap, Tensor] = {}
    positions = {} if shared is None else {"position_ids": shared.position_BL}
    with _sequences_of_rows(shared), _tapped(body, taps, taken):
        final_BLD = body(input_ids=input_ids_BL, use_cache=False, **positions).last_hidden_state
    return StudentOutputs(final_BLD, {tap: _taken(body, taken, tap, final_BLD) for tap in taps})


def blocks_of(body: Any) -> nn.ModuleList:
    """The decoder blocks in their order.

    Raises:
        ModelError: the architecture has no one list of them.
    """
    count = body.config.get_text_config().num_hidden_layers
    found = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(found) != 1:
        raise ModelError(
            f"{type(body).__name__} has {len(found)} lists of {count} blocks where one was expected: its layers cannot be tapped, so no "
            "loss on them is possible with this student"
        )
    return found[0]


class _Tapped(nn.Module):
    """Stands in the place of a block for one pass, and keeps what the block reads and gives."""

    def __init__(self, block: nn.Module, number: int, taps: Sequence[Tap], taken: dict[Tap, Tensor]) -> None:
        super().__init__()
        self.training = block.training
        # Not as a child: what looks at parameters or modules meanwhile must not find them twice.
        self.__dict__.update(block=block, number=number, taps=taps, taken=taken)

    def __getattr__(self, name: str) -> Any:
        """Loops over blocks ask them for their kind of attention and the like."""
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        if self.number == 1 and 0 in self.taps:
            self._keep(0, args[0] if args else kwargs["hidden_states"])
        inside = [tap for tap in self.taps if isinstance(tap, FfnTap) and tap.block == self.number]
        if inside:
            output, *found = _with_ffn(self.block, tuple(tap.quantiles for tap in inside), args, kwargs)
            for tap, figures_BLX in zip(inside, found, strict=True):
                self._keep(tap, figures_BLX)
        else:
            output = self.block(*args, **kwargs)
        if self.number in self.taps:
            self._keep(self.number, output[0] if isinstance(output, tuple) else output)
        return output

    def _keep(self, tap: Tap, state_BLD: Tensor) -> None:
        if tap in self.taken:
            raise ModelError(
                f"block {block_of(tap)} of the student runs more than once in a pass, so its output is not one tensor"
            )
        self.taken[tap] = state_BLD


def down_projection(block: nn.Module) -> nn.Module:
    """The module that reads the activation of a block's FFN.

    Raises:
        ModelError: there is no one such module, as with experts.
    """
    found = getattr(getattr(block, "mlp", None), "down_proj", None)
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{type(block).__name__} has no mlp.down_proj: its FFN cannot be tapped, so no loss.ffn is possible with this student"
        )
    return found


def _with_ffn(block: nn.Module, quantiles: Sequence[bool], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block gives, then what `FfnTap` says, [B, L, 1 or 17] each. The block runs plainly, checkpointed if it is told to be.

    The hook lives inside the checkpointed function, so that the second computation is the first one again.
    """
    down = down_projection(block)

    def run(*args: Any) -> Any:
        found: list[Tensor] = []

        def read(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            energy_BL1 = ffn.energy(given[0]).unsqueeze(-1)
            found.extend(torch.cat([energy_BL1, ffn.profile(given[0])], -1) if q else energy_BL1 for q in quantiles)

        handle = down.register_forward_pre_hook(read)
        try:
            output = nn.Module.__call__(block, *args, **kwargs)
        finally:
            handle.remove()
        return output, *found

    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return run(*args)
    kwargs = kwargs | {name: None for name in ("past_key_values", "layer_past") if name in kwargs}
    is_recorded = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()  # then nothing draws numbers
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=not is_recorded)


@contextlib.contextmanager
def _tapped(body: Any, taps: Sequence[Tap], taken: dict[Tap, Tensor]) -> Iterator[None]:
    if not taps:
        yield
        return
    blocks = blocks_of(body)._modules
    plain = dict(blocks)
    numbers = [block_of(tap) for tap in taps]
    places = sorted({max(number, 1) for number in numbers})
    if min(numbers) < 0 or places[-1] > len(plain):
        raise ModelError(
            f"taps must lie in 0..{len(plain)}, the embedding and the blocks of the student, not {numbers}"
        )
    try:
        for place in places:
            block = plain[str(place - 1)]
            assert block is not None
            blocks[str(place - 1)] = _Tapped(block, place, taps, taken)
        yield
    finally:
        blocks.update(plain)


def _taken(body: Any, taken: dict[Tap, Tensor], tap: Tap, final_BLD: Tensor) -> Tensor:
    dims = 2 if isinstance(tap, FfnTap) else 3
    if tap not in taken or taken[tap].shape[:dims] != final_BLD.shape[:dims]:
        found = f"gives {list(taken[tap].shape)}" if tap in taken else "was not run"
        raise ModelError(
            f"block {block_of(tap)} of {type(body).__name__} {found} where {list(final_BLD.shape)} was expected: its layers cannot be tapped"
        )
    return taken[tap]


def _one_sequence_a_row() -> contextlib.AbstractContextManager[None]:
    return _sequences_of_rows(None)


@contextlib.contextmanager
def _sequences_of_rows(shared: SharedRows | None) -> Iterator[None]:
    """Spares transformers two questions whose answers are known: which sequences share a row, and whether it is traced.

    Without a mask it looks for several sequences in a row by their positions, on the device, and waits for the answer; and while passes
    are recorded (`speed/cuda_graphs.py`) it would not look, and make a mask of all positions instead (masking_utils, 5.16 to 5.19).
    """
    before = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    masking_utils.find_packed_sequence_indices = lambda *_: None if shared is None else shared.sequence_BL
    masking_utils.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = before
