"""The section `generate`: answers that the teacher writes for `student-trainer label --generate` (sequence-level distillation)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from student_trainer.config.fields import AbsolutePath, Positive
from student_trainer.config.files import Settings


class GenerateConfig(Settings):
    """How the teacher answers the rows of `data.train` anew.

    Attributes:
        output_dir: of rows.jsonl, refused.jsonl and stats.json; the same command goes on with what is there.
        samples: answers of each row, a row each.
        temperature, top_p: of sampling; at temperature 0 the likeliest token is taken every time.
        max_new_tokens: of an answer; one that is cut off there is refused, since it teaches no end.
        seed: of all samples.
        prompts_per_call, calls: rows of one call, and calls under way.
    """

    output_dir: AbsolutePath
    samples: Positive = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 512
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    prompts_per_call: Positive = 16
    calls: Positive = 2

    @field_validator("output_dir")
    @classmethod
    def _at_home(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError as error:  # no HOME, and a user that has none
            raise ValueError(f"{error}: name the folder without ~") from error

    @model_validator(mode="after")
    def _differing(self) -> GenerateConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} of temperature 0 would all be the same: raise the temperature, or take one"
            )
        return self
