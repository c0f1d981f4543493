"""Whether a trace may be learned from: the deterministic order of docs/concepts/method.md 7.2, with a reason for every no.

In: the text a teacher wrote, in whatever style, and the exact user content; out: a `Verdict`. The same text gets the same verdict for ever;
nothing here samples, asks a model, or lets anything through that it could not check.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from student_trainer.data.trace_schema import (
    UNCLAIMED,
    Caps,
    Evidence,
    Reason,
    Step,
    Trace,
    TraceError,
    prompt_sha256,
)
from student_trainer.data.trace_spans import find_span
from student_trainer.traces.answers import normalize_answer, same_answer
from student_trainer.traces.arithmetic import false_equation
from student_trainer.traces.styles.bounds import Bounds
from student_trainer.traces.styles.draft import Draft, Reading
from student_trainer.traces.styles.free_text import stated_part
from student_trainer.traces.styles.reading import read_draft

# More steps than this share with nothing left of their evidence, and the whole trace is invented (docs/concepts/method.md 7.2).
MAX_LOST_SHARE = 0.5
_ENDS = (".", "!", "?", "。", "！", "？", ")")  # of a sentence


@dataclass(frozen=True)
class Verdict:
    """What became of one text.

    Attributes:
        trace: the checked trace, its spans exact; None if rejected.
        reason, detail: why it was rejected; both empty if it was not.
        repaired: spans whose claimed offsets were mended.
        dropped: spans that stand nowhere in the prompt and were left out.
        draft: what the text was read as; None if it could not be read. Its steps are those of `trace`, in the same order.
    """

    trace: Trace | None
    reason: Reason | None = None
    detail: str = ""
    repaired: int = 0
    dropped: int = 0
    draft: Draft | None = None

    @property
    def accepted(self) -> bool:
        return self.trace is not None


def verify(
    text: str,
    prompt: str,
    *,
    finished: bool = True,
    gold: str | None = None,
    majority: str | None = None,
    caps: Caps | None = None,
    reading: Reading | None = None,
    bounds: Bounds | None = None,
) -> Verdict:
    """Checks one trace.

    Args:
        text: what the teacher wrote.
        prompt: the exact user content.
        finished: whether the teacher came to an end by itself; free text that did not is read up to its last whole line, if that states the answer.
        gold: the known answer, if there is one; else `majority` decides.
        majority: normalised answer of most samples of this prompt; "" if they are at odds.
        caps: the longest accepted trace.
        reading: the style in which the text is read; JSON if None.
        bounds: what the grammar held the teacher to, if it did: a text that fills its bound and ends amid a sentence was cut there.
    """
    caps = caps or Caps()
    reading = reading or Reading()
    if not finished:
        part = stated_part(text, reading) if reading.style == "free" else None
        if part is None:
            return Verdict(None, "unfinished", "the teacher ran out of tokens")
        text = part
    draft = None
    try:
        draft = read_draft(text, reading)
        trace = draft.trace
        _check_cuts(trace, bounds)
        _check_counts(trace, caps)
        _check_prompt(trace, prompt)
        trace, repaired, dropped = _check_evidence(trace, prompt)
        _check_steps(trace)
        trace = replace(trace, answer=replace(trace.answer, normalized=normalize_answer(trace.answer.text)))
        _check_answer(trace, gold, majority)
        _check_arithmetic(trace)
        _check_lengths(trace, caps)
    except TraceError as error:
        return Verdict(None, error.reason, error.detail, draft=draft)
    checked = replace(trace, prompt_sha256=prompt_sha256(prompt))
    return Verdict(checked, repaired=repaired, dropped=dropped, draft=draft)


def _check_cuts(trace: Trace, bounds: Bounds | None) -> None:
    """Refuses what the grammar ended, not the teacher: it would teach half sentences. A quote that was cut is still a quote."""
    if bounds is None:
        return
    texts = [(f"step {step.id}", step.text, bounds.step_chars) for step in trace.steps]
    for name, text, limit in (*texts, ("the answer", trace.answer.text, bounds.answer_chars)):
        if len(text) == limit and not text.rstrip().endswith(_ENDS):
            raise TraceError("cut_text", f"{name} was cut at {limit} characters")


def _check_prompt(trace: Trace, prompt: str) -> None:
    if trace.prompt_sha256 and trace.prompt_sha256 != prompt_sha256(prompt):
        raise TraceError("wrong_prompt", f"prompt_sha256 is {trace.prompt_sha256[:16]}…")


def _check_evidence(trace: Trace, prompt: str) -> tuple[Trace, int, int]:
    """The trace with right offsets only; spans mended, spans left out."""
    ids = [quote.id for quote in trace.evidence]
    if len(set(ids)) != len(ids):
        raise TraceError("bad_reference", "two pieces of evidence have the same id")
    data, kept, repaired = prompt.encode(), [], 0
    for quote in trace.evidence:
        span = find_span(prompt, quote.text, quote.start, quote.end)
        if span is not None:
            found = Evidence(quote.id, *span, data[span[0] : span[1]].decode())
            repaired += found != quote and quote.start != UNCLAIMED
            kept.append(found)
    known = {quote.id for quote in kept}
    bearing = [step for step in trace.steps if step.evidence]
    lost = [step.id for step in bearing if not known.intersection(step.evidence)]
    dropped = len(ids) - len(kept)
    if (bearing and len(lost) > MAX_LOST_SHARE * len(bearing)) or (not bearing and dropped > MAX_LOST_SHARE * len(ids)):
        detail = f"{len(lost)} of {len(bearing)} steps rest on quotes that are not in the prompt ({dropped} of {len(ids)} quotes)"
        raise TraceError("invented_evidence", detail)
    steps = [replace(step, evidence=tuple(i for i in step.evidence if i in known)) for step in trace.steps]
    return replace(trace, steps=tuple(steps), evidence=tuple(kept)), repaired, dropped


def _check_steps(trace: Trace) -> None:
    """Ids rise, dependencies exist, and none leads back to itself or forward."""
    ids = [step.id for step in trace.steps]
    if len(set(ids)) != len(ids):
        raise TraceError("bad_reference", "two steps have the same id")
    by_id = {step.id: step for step in trace.steps}
    for step in trace.steps:
        unknown = [number for number in step.depends_on if number not in by_id]
        if unknown:
            raise TraceError("bad_reference", f"step {step.id} depends on step {unknown[0]}, which is not there")
    cycle = _in_a_cycle(by_id)
    if cycle is not None:
        raise TraceError("cyclic_dependency", f"step {cycle} depends on itself")
    if ids != sorted(ids):
        raise TraceError("bad_reference", "the ids of the steps do not rise")
    for step in trace.steps:
        if any(number > step.id for number in step.depends_on):
            raise TraceError("bad_reference", f"step {step.id} depends on a later one")


def _in_a_cycle(by_id: dict[int, Step]) -> int | None:
    """A step that can be reached from itself, or None."""
    left = dict(by_id)
    while free := [number for number, step in left.items() if not any(i in left for i in step.depends_on)]:
        for number in free:
            del left[number]
    return next(iter(left), None)


def _check_answer(trace: Trace, gold: str | None, majority: str | None) -> None:
    answer = trace.answer.normalized
    if gold is not None:
        if not same_answer(trace.answer.text, gold):
            raise TraceError("wrong_answer", f"{answer[:80]!r}, not {normalize_answer(gold)[:80]!r}")
    elif majority is not None and not (majority and same_answer(trace.answer.text, majority)):
        most = f"most have {majority[:80]!r}" if majority else "no answer has a majority"
        raise TraceError("minority_answer", f"{answer[:80]!r}, {most}")


def _check_arithmetic(trace: Trace) -> None:
    for step in trace.steps:
        wrong = false_equation(step.text) if step.kind == "compute" else ""
        if wrong:
            raise TraceError("wrong_arithmetic", f"step {step.id}: {wrong[:120]}")


def _check_counts(trace: Trace, caps: Caps) -> None:
    """Before anything is searched for: every quote costs a walk through the prompt."""
    _check_sizes([("steps", len(trace.steps), caps.steps), ("evidence", len(trace.evidence), caps.evidence)])


def _check_lengths(trace: Trace, caps: Caps) -> None:
    _check_sizes(
        [
            ("answer bytes", len(trace.answer.text.encode()), caps.answer_bytes),
            *((f"bytes of step {step.id}", len(step.text.encode()), caps.step_bytes) for step in trace.steps),
            *(
                (f"bytes of evidence {quote.id}", quote.end - quote.start, caps.evidence_bytes)
                for quote in trace.evidence
            ),
        ]
    )


def _check_sizes(sizes: list[tuple[str, int, int]]) -> None:
    for name, size, limit in sizes:
        if size > limit:
            raise TraceError("too_long", f"{name}: {size}, limit {limit}")
