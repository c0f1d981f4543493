"""What signals of chosen blocks have in common: which blocks, and what is refused about them.

Blocks are counted from 1 to `TeacherInfo.layers`; 0 is the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from teacher_wire.core.errors import LimitError, RequestError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import Signal

MAX_LAYERS = 1024
_SHOWN = 8


@dataclass(frozen=True)
class LayerSignal(Signal):
    """A signal of chosen blocks.

    Attributes:
        layers: numbers of blocks, rising.
    """

    first_layer: ClassVar[int] = 1
    reductions: ClassVar[tuple[str, ...]]

    layers: tuple[int, ...] = ()

    def check(self, vocab_rows: int) -> None:
        layers, reduction = self.layers, getattr(self, "reduction", "")
        if not layers:
            raise RequestError(f"{self.kind} is of chosen layers: name one", field="layers", value="none")
        if len(layers) > MAX_LAYERS:
            raise RequestError("too many layers", field="layers", value=len(layers), limit=MAX_LAYERS)
        if any(not a < b for a, b in pairwise(layers)):
            shown = ",".join(map(str, layers[:_SHOWN])) + (",..." if len(layers) > _SHOWN else "")
            raise RequestError(f"layers of {self.kind} must rise", field="layers", value=shown)
        if layers[0] < self.first_layer:
            why = "layer 0 is the embedding and has none" if layers[0] == 0 else "no such layer"
            raise RequestError(f"{self.kind}: {why}", field="layers", value=layers[0], limit=f">= {self.first_layer}")
        if reduction not in self.reductions:
            raise RequestError(
                f"unknown reduction of {self.kind}",
                field="reduction",
                value=ascii(reduction[:64]),
                limit="|".join(self.reductions),
            )

    def check_teacher(self, info: TeacherInfo) -> None:
        if self.layers[-1] > info.layers:
            raise LimitError(
                f"{self.kind}: teacher {info.name!r} has no such layer",
                field="layers",
                value=self.layers[-1],
                limit=f"{self.first_layer}..{info.layers}",
            )
