"""All samples of one question judged together: which are right, how sure the teacher is, and which one is kept.

In: a question and its samples; out: a `Judgement`. The order of checks is `student_trainer.traces.verify`'s; confidence is
agreement, not what a model says of itself (algorithms.md 7.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from student_trainer.data.trace_schema import Caps, Sampling, Trace, TraceError, parse_draft, strip_fence
from student_trainer.traces.answers import majority_answer, normalize_answer, same_answer
from student_trainer.traces.questions import Question
from student_trainer.traces.token_spans import mean_probability, token_spans, value_spans
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
    question: Question, samples: Sequence[Sample], tokenizer: Any, spec: SamplingSpec, info: TeacherInfo, caps: Caps
) -> Judgement:
    """Judges the samples of one question, whatever order they came in."""
    ordered = sorted(samples, key=lambda sample: sample.index)
    texts = [tokenizer.decode(sample.token_ids_n, skip_special_tokens=True) for sample in ordered]
    answers = [answer for text in texts if (answer := _answer(text)) is not None]
    majority = majority_answer(answers)
    decisive = majority[0] if majority else ""  # without a majority no answer is right
    judged = tuple(
        Judged(
            sample,
            text,
            verify(
                text, question.prompt, finished=sample.finish == "stop",
                gold=question.gold, majority=decisive, caps=caps,
            ),
        )
        for sample, text in zip(ordered, texts, strict=True)
    )  # fmt: skip
    completed = [
        (one, _complete(one, one.verdict.trace, answers, tokenizer, spec, info))
        for one in judged
        if one.verdict.trace is not None
    ]
    best = max(completed, key=lambda pair: _rank(pair[0]), default=None)
    return Judgement(question, judged, best[1] if best else None)


def _rank(judged: Judged) -> tuple[float, float, int]:
    """The surest first; what the teacher says of itself only breaks ties, then the first sample wins."""
    stated = judged.verdict.trace.answer.confidence if judged.verdict.trace else 0.0
    return judged.sample.logp / len(judged.sample.token_ids_n), stated, -judged.sample.index


def _answer(text: str) -> str | None:
    """The normalised answer of anything that has the form of a trace."""
    try:
        return normalize_answer(parse_draft(text).answer.text)
    except TraceError:
        return None


def _complete(
    judged: Judged, trace: Trace, answers: list[str], tokenizer: Any, spec: SamplingSpec, info: TeacherInfo
) -> Trace:
    """The trace with what only we know: who wrote it, how it was drawn, how sure it is."""
    sample, text = judged.sample, judged.text
    inside = strip_fence(text)
    offset = text.index(inside)
    places = {path: (a + offset, b + offset) for path, (a, b) in value_spans(inside).items()}
    spans = token_spans(sample.token_ids_n.tolist(), text, tokenizer)
    sure = lambda *path: mean_probability(spans, sample.token_logp_n, places[path])  # noqa: E731
    steps = tuple(
        replace(step, confidence=min(1.0, max(LEAST_CONFIDENCE, sure("steps", number, "text"))))
        for number, step in enumerate(trace.steps)
    )
    agree = sum(same_answer(answer, trace.answer.normalized) for answer in answers)
    confidence = agree / spec.samples if spec.samples >= AGREEMENT_FROM else sure("answer", "text")
    return replace(
        trace,
        steps=steps,
        answer=replace(trace.answer, confidence=min(1.0, confidence)),
        teacher_id=info.name,
        teacher_revision=info.fingerprint,
        sampling=Sampling(spec.samples, agree, spec.temperature, spec.seed),
    )
