"""The configuration of `student-trainer traces`, and the section `generate` of a run: what a teacher is asked to write. Frozen, strict, parsed
before torch is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from student_trainer.config.data import SourceConfig, listed_sources
from student_trainer.config.fields import AbsolutePath, Fraction, HomeText, Positive
from student_trainer.config.files import Settings, parse_as, read_tree
from student_trainer.config.teachers import TeacherConfig

# Said to the teacher before the question. It names what the grammar holds it to; a tuned teacher may need less, or "".
INSTRUCTION = (
    "Solve the user's problem step by step and answer with one JSON object. Its keys, in this order: "
    '"evidence": quotes from the user\'s text, each with "id" (from 0), "start" and "end" (byte offsets of the quote) '
    'and "text" (the quote, letter by letter); "steps": each with "id" (from 1, rising), "kind" (extract, infer, compute, '
    'verify or decide), "text", "evidence" (ids of quotes it rests on) and "depends_on" (ids of earlier steps); '
    '"answer": an object with "text", the short final answer alone.'
)


class _Strict(Settings):
    """A section; see `Settings`."""


class QuestionConfig(_Strict):
    """What is asked.

    Attributes:
        sources: rows of any training format, whose last answer is the known one, or of format `question`:
            `{prompt, answer, system}`, the last two optional.
        template: `chat` (the tokenizer's), `plain`, or `auto`.
        system_prompt: put before questions that have no system turn.
        instruction: said to the teacher after it; the student never sees it.
        use_answers: hold traces to the known answers; false lets the majority of samples decide.
    """

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    template: Literal["auto", "chat", "plain"] = "auto"
    system_prompt: str = ""
    instruction: str = INSTRUCTION
    use_answers: bool = True

    @field_validator("sources", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        return listed_sources(value)


class SamplingConfig(_Strict):
    """How traces are drawn.

    Attributes:
        samples: of each question; from 4 on, their agreement is the confidence in an answer.
        temperature, top_p, max_new_tokens, seed: see `teacher_wire.generate.messages.SamplingSpec`.
        json_schema: hold the teacher to the schema of a trace; false trusts it to know the form.
    """

    samples: Positive = 4
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 1024
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    json_schema: bool = True


class CapsConfig(_Strict):
    """The longest accepted trace; lengths in UTF-8 bytes."""

    steps: Positive = 32
    step_bytes: Positive = 1024
    evidence: Positive = 64
    evidence_bytes: Positive = 1024
    answer_bytes: Positive = 1024


class AcceptConfig(_Strict):
    """When to stop: fewer than `min_rate` of at least `after` samples accepted."""

    min_rate: Fraction = 0.2
    after: Positive = 200


class GenerateConfig(_Strict):
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

    @model_validator(mode="after")
    def _differing(self) -> GenerateConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} of temperature 0 would all be the same: raise the temperature, or take one"
            )
        return self


class TracesConfig(_Strict):
    """Everything `student-trainer traces` needs.

    Attributes:
        output_dir: of traces.jsonl, quarantine.jsonl, stats.json.
        tokenizer: folder or hub id of the student's tokenizer; the teacher must have the same.
        prompts_per_call, calls: questions of one call, and calls under way.
    """

    output_dir: AbsolutePath
    tokenizer: HomeText
    data: QuestionConfig
    teacher: TeacherConfig
    sampling: SamplingConfig = SamplingConfig()
    caps: CapsConfig = CapsConfig()
    accept: AcceptConfig = AcceptConfig()
    prompts_per_call: Positive = 16
    calls: Positive = 2


def load_traces_config(path: Path, overrides: list[str] | None = None) -> TracesConfig:
    """Reads a config file and applies `section.field=value` overrides.

    Raises:
        ConfigError: one line that names file and key.
    """
    return parse_as(TracesConfig, read_tree(path.expanduser(), overrides), str(path))
