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

Style = Literal["quotes", "steps", "offsets", "free"]
# Said to the teacher before the question, by style. They name what the grammar holds it to; a tuned teacher may need less, or "".
INSTRUCTIONS: dict[Style, str] = {
    "quotes": (
        "Solve the user's problem step by step. Reply with one JSON object: "
        '"steps" is a list, and each step has "text", one short sentence, and "quotes", a list of the words of the problem that the step '
        'uses, copied letter by letter; "answer" is the short final answer alone.'
    ),
    "steps": (
        "Solve the user's problem step by step. Reply with one JSON object: "
        '"steps" is a list of short sentences; "answer" is the short final answer alone.'
    ),
    "offsets": (
        "Solve the user's problem step by step and answer with one JSON object. Its keys, in this order: "
        '"evidence": quotes from the user\'s text, each with "id" (from 0), "start" and "end" (byte offsets of the quote) '
        'and "text" (the quote, letter by letter); "steps": each with "id" (from 1, rising), "kind" (extract, infer, compute, '
        'verify or decide), "text", "evidence" (ids of quotes it rests on) and "depends_on" (ids of earlier steps); '
        '"answer": an object with "text", the short final answer alone.'
    ),
    "free": (
        "Solve the user's problem step by step, each step on a line of its own. Put words that you copy from the problem into double quotation "
        'marks. End with one line that begins with "Answer:" and gives the short final answer alone.'
    ),
}


class _Strict(Settings):
    """A section; see `Settings`."""


class ExampleConfig(_Strict):
    """A worked example, shown to the teacher as an earlier question and its reply.

    Attributes:
        prompt: the question.
        reply: what the teacher should have written, letter by letter, in the form of the style.
    """

    prompt: Annotated[str, Field(min_length=1)]
    reply: Annotated[str, Field(min_length=1)]


# Shown with `data.builtin_examples`.
EXAMPLES: dict[Style, tuple[ExampleConfig, ...]] = {
    "quotes": (
        ExampleConfig(
            prompt="Mia has 4 green pens and 3 blue pens. She buys 6 more. How many pens does she have now?",
            reply='{"steps":[{"text":"At first Mia has 4 + 3 = 7 pens.","quotes":["4 green pens and 3 blue pens"]},'
            '{"text":"Then she has 7 + 6 = 13 pens.","quotes":["buys 6 more"]}],"answer":"13"}',
        ),
        ExampleConfig(
            prompt="Leo wears a grey hat. Nora wears a pink hat. What colour is Nora's hat?",
            reply='{"steps":[{"text":"The question is about Nora.","quotes":["Nora\'s hat"]},'
            '{"text":"Her hat is pink.","quotes":["Nora wears a pink hat"]}],"answer":"pink"}',
        ),
    ),
    "steps": (
        ExampleConfig(
            prompt="Mia has 4 green pens and 3 blue pens. How many pens does she have?",
            reply='{"steps":["Mia has 4 + 3 = 7 pens."],"answer":"7"}',
        ),
        ExampleConfig(
            prompt="Leo wears a grey hat. Nora wears a pink hat. What colour is Nora's hat?",
            reply='{"steps":["The question is about Nora.","Nora wears a pink hat."],"answer":"pink"}',
        ),
    ),
    "offsets": (
        ExampleConfig(
            prompt="Mia has 4 green pens and 3 blue pens. How many pens does she have?",
            reply='{"evidence":[{"id":0,"start":8,"end":36,"text":"4 green pens and 3 blue pens"}],"steps":[{"id":1,"kind":"compute",'
            '"text":"4 + 3 = 7","evidence":[0],"depends_on":[]}],"answer":{"text":"7"}}',
        ),
    ),
    "free": (
        ExampleConfig(
            prompt="Mia has 4 green pens and 3 blue pens. She buys 6 more. How many pens does she have now?",
            reply='At first Mia has 4 + 3 = 7 pens, since she has "4 green pens and 3 blue pens".\n'
            'Then she "buys 6 more", so she has 7 + 6 = 13 pens.\nAnswer: 13',
        ),
        ExampleConfig(
            prompt="Leo wears a grey hat. Nora wears a pink hat. What colour is Nora's hat?",
            reply='The question is about Nora.\nThe problem says "Nora wears a pink hat".\nAnswer: pink',
        ),
    ),
}


class TagsConfig(_Strict):
    """What stands around the reasoning of a teacher that thinks in tags of its own; read with style `free`.

    Attributes:
        open: tag before the reasoning; it may be written by the teacher's chat template.
        close: tag behind the reasoning.
    """

    open: Annotated[str, Field(min_length=1)] = "<think>"
    close: Annotated[str, Field(min_length=1)] = "</think>"

    @model_validator(mode="after")
    def _two(self) -> TagsConfig:
        if self.open in self.close or self.close in self.open:
            raise ValueError(f"open={self.open!r} and close={self.close!r}: neither may be a part of the other")
        return self


class QuestionConfig(_Strict):
    """What is asked.

    Attributes:
        sources: rows of any training format, whose last answer is the known one, or of format `question`: `{prompt, answer, system}`, the
            last two optional.
        template: `chat` (the tokenizer's chat template), `plain`, or `auto`.
        system_prompt: system message of questions that have none.
        instruction: instruction to the teacher after the system message; the student never sees it. null takes the one of the style.
        examples: worked examples of your own, shown to the teacher before the question; the student never sees them.
        builtin_examples: whether two short built-in examples are shown. null shows them with styles `quotes` and `steps` where you give
            none.
        use_answers: whether traces must reach the known answers; false lets the majority of samples decide.
    """

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    template: Literal["auto", "chat", "plain"] = "auto"
    system_prompt: str = ""
    instruction: str | None = None
    examples: tuple[ExampleConfig, ...] = ()
    builtin_examples: bool | None = None
    use_answers: bool = True

    @field_validator("sources", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        return listed_sources(value)


class SamplingConfig(_Strict):
    """How traces are drawn.

    Attributes:
        samples: samples of each question; from 4 on their agreement is the confidence in an answer.
        temperature: temperature of sampling; 0 takes the likeliest token.
        top_p: nucleus of sampling.
        max_new_tokens: longest sample, in tokens.
        seed: seed of all samples.
        json_schema: whether the teacher is held to the schema of a draft by a grammar; false trusts it to know the form. null is true, and
            false with style `free`, which has no schema.
        fit_budget: with the schema, whether its lists and strings are made so short that the longest draft takes `max_new_tokens`; false
            leaves them as long as `caps` allows, for a teacher that is known to be brief.
    """

    samples: Positive = 4
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 1024
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    json_schema: bool | None = None
    fit_budget: bool = True


class CapsConfig(_Strict):
    """The longest accepted trace; lengths in UTF-8 bytes.

    Attributes:
        steps: most steps of a trace.
        step_bytes: longest step, in UTF-8 bytes.
        evidence: most quotes of a trace.
        evidence_bytes: longest quote, in UTF-8 bytes.
        answer_bytes: longest answer, in UTF-8 bytes.
    """

    steps: Positive = 32
    step_bytes: Positive = 1024
    evidence: Positive = 64
    evidence_bytes: Positive = 1024
    answer_bytes: Positive = 1024


class AcceptConfig(_Strict):
    """When to stop: fewer than `min_rate` of at least `after` samples accepted.

    Attributes:
        min_rate: smallest share of samples that must be accepted.
        after: number of samples after which the share is looked at.
    """

    min_rate: Fraction = 0.2
    after: Positive = 200


class GenerateConfig(_Strict):
    """How the teacher answers the rows of `data.train` anew.

    Attributes:
        output_dir: folder of rows.jsonl, refused.jsonl and stats.json; the same command goes on with what is there.
        samples: answers of each row; each becomes a row.
        temperature: temperature of sampling; 0 takes the likeliest token every time.
        top_p: nucleus of sampling.
        max_new_tokens: longest answer, in tokens; one that is cut off there is refused, since it teaches no end.
        seed: seed of all samples.
        prompts_per_call: rows of one call.
        calls: calls under way at a time.
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
        output_dir: folder of traces.jsonl, quarantine.jsonl and stats.json.
        tokenizer: folder or hub id of the student's tokenizer; the teacher must have the same.
        style: how the teacher writes: `quotes`, short JSON of steps, the words of the prompt that each rests on, and an answer; `steps`,
            the same without quotes, for teachers too small to copy; `offsets`, JSON with ids and byte offsets, for teachers tuned to it;
            `free`, its own reasoning in `tags` or plain lines, and a line `Answer: ...`.
        prompts_per_call: questions of one call.
        calls: calls under way at a time.
    """

    output_dir: AbsolutePath
    tokenizer: HomeText
    data: QuestionConfig
    teacher: TeacherConfig
    style: Style = "quotes"
    tags: TagsConfig = TagsConfig()
    sampling: SamplingConfig = SamplingConfig()
    caps: CapsConfig = CapsConfig()
    accept: AcceptConfig = AcceptConfig()
    prompts_per_call: Positive = 16
    calls: Positive = 2

    @model_validator(mode="after")
    def _of_one_style(self) -> TracesConfig:
        if self.style == "free" and self.sampling.json_schema:
            raise ValueError(
                "sampling.json_schema=true: style free has no schema; leave it out, or choose another style"
            )
        if self.style != "free" and self.tags != TagsConfig():
            raise ValueError(f"tags are read with style free, not {self.style}: leave them out, or choose style free")
        return self

    @property
    def held_to_schema(self) -> bool:
        """Whether the teacher writes under a grammar."""
        return self.style != "free" if self.sampling.json_schema is None else self.sampling.json_schema

    @property
    def instruction(self) -> str:
        """What the teacher is told before a question."""
        return INSTRUCTIONS[self.style] if self.data.instruction is None else self.data.instruction

    @property
    def examples(self) -> tuple[ExampleConfig, ...]:
        """What the teacher is shown before a question."""
        own, builtin = self.data.examples, self.data.builtin_examples
        if builtin is None:
            builtin = not own and self.style in ("quotes", "steps")
        return (*(EXAMPLES[self.style] if builtin else ()), *own)


def load_traces_config(path: Path, overrides: list[str] | None = None) -> TracesConfig:
    """Reads a config file and applies `section.field=value` overrides.

    Raises:
        ConfigError: one line that names file and key.
    """
    return parse_as(TracesConfig, read_tree(path.expanduser(), overrides), str(path))
