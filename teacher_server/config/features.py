"""The section `features` of a teacher: what states of its layers are projected on before they travel."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from teacher_server.config.files import Settings

Layer = Annotated[int, Field(ge=0)]


class FeaturesConfig(Settings):
    """Principal components of the states of chosen layers, calibrated when a revision of the teacher is loaded for the first time.

    Only the reduction `pca` of `layers` needs them: all other signals of layers are offered without this section.

    Attributes:
        layers: `all`, or rising numbers of blocks; 0 is the embedding.
        rank: principal components of a layer, at most the model's width.
        calibration: a text file, or JSONL of which every text of a row counts; null takes Python's documentation, which every Python
            carries.
        calibration_tokens: tokens taken from the beginning of it.
        folder: folder where bases are kept, so that a revision has the same basis wherever and whenever it is loaded; replicas on several
            machines need one that all of them see. null computes bases at every loading, and another machine may round otherwise.
    """

    layers: Annotated[tuple[Literal["all"] | Layer, ...], Field(min_length=1)] = ("all",)
    rank: Annotated[int, Field(ge=1)] = 256
    calibration: Path | None = None
    calibration_tokens: Annotated[int, Field(ge=64, le=16_777_216)] = 16_384
    folder: Path | None = Path("~/.cache/lyceum/layer_basis")

    @model_validator(mode="after")
    def _rising(self) -> FeaturesConfig:
        if "all" in self.layers and len(self.layers) > 1:
            raise ValueError("layers are `all`, or numbers")
        if any(isinstance(a, int) and isinstance(b, int) and a >= b for a, b in pairwise(self.layers)):
            raise ValueError(f"layers must rise, got {', '.join(map(str, self.layers))}")
        return self

    def chosen(self, blocks: int) -> tuple[int, ...]:
        """Numbers of layers of a model of so many blocks; some may be beyond them."""
        if "all" in self.layers:
            return tuple(range(blocks + 1))
        return tuple(layer for layer in self.layers if isinstance(layer, int))
