"""All samples of one question judged together: which are right, how sure the teacher is, and which one is kept.

In: a question and its samples, written in the style of the run; out: a `Judgement`. The order of checks is `student_trainer.traces.verify`'s; confidence is
agreement, not what a model says of itself (docs/concepts/method.md 7.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from student_trainer.config.traces import TracesConfig
from student_trainer.data.trace_schema import Caps, Sampling, Trace, TraceError
from student_trainer.traces.answers import majority_answer, normalize_answer, same_answer
from student_trainer.traces.questions import Question
from student_trainer.traces.styles.bounds import Bounds
from student_trainer.traces.styles.draft import Draft, Reading
from student_trainer.traces.styles.reading import read_draft
from student_trainer.traces.token_spans import mean_probability, token_spans
from student_trainer.traces.verify import Verdict, verify
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate.messages import Sample, SamplingSpec

AGREEMENT_FROM = 4  # samples; below, the probability of the answer's own tokens says more
LEAST_CONFIDENCE = 0.2  # of a step


@dataclass(frozen=True)
class Judged:
    """One sample, its text, and what became of it."""

    sample: Sample
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Judgement:
    """What became of a question; `kept` is the trace to learn from, or None."""

    question: Question
    samples: tuple[Judged, ...]
    kept: Trace | None


def judge(
    question: Question,
    samples: Sequence[Sample],
    tokenizer: Any,
    spec: SamplingSpec,
    info: TeacherInfo,
    caps: Caps,
    reading: Reading | None = None,
    bounds: Bounds | None = None,
) -> Judgement:
    """Judges the samples of one question, whatever order they came in."""
    reading = reading or Reading()
    ordered = sorted(samples, key=lambda sample: sample.index)
    texts = [_text(sample, tokenizer, reading) for sample in ordered]
    answers = [answer for text in texts if (answer := _answer(text, reading)) is not None]
    majority = majority_answer(answers)
    decisive = majority[0] if majority else ""  # without a majority no answer is right
    judged = tuple(
        Judged(
            sample,
            text,
            verify(
                text, question.prompt, finished=sample.finish == "stop", gold=question.gold, majority=decisive,
                caps=caps, reading=reading, bounds=bounds,
            ),
        )
        for sample, text in zip(ordered, texts, strict=True)
    )  # fmt: skip
    completed = []
    for one in judged:
        if one.verdict.trace is not None and one.verdict.draft is not None:
            trace = _complete(one, one.verdict.trace, one.verdict.draft, answers, tokenizer, spec, info, reading)
            completed.append((one, trace))
    best = max(completed, key=lambda pair: _rank(pair[0]), default=None)
    return Judgement(question, judged, best[1] if best else None)


def reading_of(config: TracesConfig, tokenizer: Any) -> Reading:
    """How the samples of a run are read."""
    return Reading(config.style, config.tags, tuple(tokenizer.all_special_tokens))


def _text(sample: Sample, tokenizer: Any, reading: Reading) -> str:
    """What the teacher wrote. Tags of reasoning may be special tokens, so free text keeps those (but the ones that end it)."""
    ids = _ids(sample, tokenizer, reading)
    return str(tokenizer.decode(ids, skip_special_tokens=reading.style != "free"))


def _ids(sample: Sample, tokenizer: Any, reading: Reading) -> list[int]:
    ids: list[int] = sample.token_ids_n.tolist()
    special = {token for token in tokenizer.all_special_ids if tokenizer.decode([token]) != reading.tags.close}
    while reading.style == "free" and ids and ids[-1] in special:
        ids.pop()
    return ids


def _rank(judged: Judged) -> tuple[float, float, int]:
    """The surest first; what the teacher says of itself only breaks ties, then the first sample wins."""
    stated = judged.verdict.trace.answer.confidence if judged.verdict.trace else 0.0
    return judged.sample.logp / len(judged.sample.token_ids_n), stated, -judged.sample.index


def _answer(text: str, reading: Reading) -> str | None:
    """The normalised answer of anything that has the form of its style."""
    try:
        return normalize_answer(read_draft(text, reading).trace.answer.text)
    except TraceError:
        return None


def _complete(
    judged: Judged,
    trace: Trace,
    draft: Draft,
    answers: list[str],
    tokenizer: Any,
    spec: SamplingSpec,
    info: TeacherInfo,
    reading: Reading,
) -> Trace:
    """The trace with what only we know: who wrote it, how it was drawn, how sure it is."""
    ids = _ids(judged.sample, tokenizer, reading)
    spans = token_spans(ids, judged.text, tokenizer, skip_special=reading.style != "free")
    sure = lambda place: mean_probability(spans, judged.sample.token_logp_n, place)  # noqa: E731
    steps = tuple(
        replace(step, confidence=min(1.0, max(LEAST_CONFIDENCE, sure(place))))
        for step, place in zip(trace.steps, draft.step_places, strict=True)
    )
    agree = sum(same_answer(answer, trace.answer.normalized) for answer in answers)
    confidence = agree / spec.samples if spec.samples >= AGREEMENT_FROM else sure(draft.answer_place)
    return replace(
        trace,
        steps=steps,
        answer=replace(trace.answer, confidence=min(1.0, confidence)),
        teacher_id=info.name,
        teacher_revision=info.fingerprint,
        sampling=Sampling(spec.samples, agree, spec.temperature, spec.seed),
    )
