"""What a run of traces leaves: traces.jsonl, quarantine.jsonl, progress.jsonl, stats.json; all appended, all resumable.

In: judgements in the order of the questions. A question counts once its line of progress is whole: on resumption everything
behind the last such line is cut off, so that no trace is there twice and none is missing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from student_trainer.data.trace_schema import REASONS, to_fields
from student_trainer.traces.progress_folder import ProgressFolder
from student_trainer.traces.questions import Question
from student_trainer.traces.selection import Judgement

TRACES, QUARANTINE = "traces.jsonl", "quarantine.jsonl"
_QUARANTINED_CHARS = 16_384  # of a rejected text


@dataclass
class Stats:
    """Counts since the run began, resumptions included.

    Attributes:
        questions, with_trace: asked, and with a trace to learn from.
        samples, accepted, repaired, dropped_quotes: of all samples; `repaired` are accepted ones with a mended span.
        rejected: samples by reason.
        tokens, seconds: written, and spent writing.
    """

    questions: int = 0
    with_trace: int = 0
    samples: int = 0
    accepted: int = 0
    repaired: int = 0
    dropped_quotes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rejected: dict[str, int] = field(default_factory=dict)

    def add(self, judgement: Judgement) -> None:
        """Counts one question in."""
        self.questions += 1
        self.with_trace += judgement.kept is not None
        reasons = Counter(self.rejected)
        for judged in judgement.samples:
            self.samples += 1
            self.accepted += judged.verdict.accepted
            self.repaired += judged.verdict.accepted and judged.verdict.repaired > 0
            self.dropped_quotes += judged.verdict.dropped
            self.tokens += len(judged.sample.token_ids_n)
            if judged.verdict.reason:
                reasons[judged.verdict.reason] += 1
        self.rejected = {reason: reasons[reason] for reason in REASONS if reasons[reason]}

    @property
    def rate(self) -> float:
        """Share of the samples that were accepted."""
        return self.accepted / max(1, self.samples)

    def describe(self) -> str:
        """One line."""
        rejected = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items()) or "none"
        return (
            f"{self.questions:,} questions, {self.with_trace:,} with a trace; {self.samples:,} samples: accepted "
            f"{self.accepted:,} ({self.rate:.1%}), {self.repaired:,} of them repaired; rejected: {rejected}; "
            f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        )


class TracesFolder:
    """The files of one run.

    Args:
        folder: where; made here.
        identity: digests and settings that must not change over a run.
        resume: go on with a run that is there.

    Raises:
        ConfigError, RunError: as `ProgressFolder`.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self.stats = Stats()
        self._files = ProgressFolder(
            folder, identity, (TRACES, QUARANTINE), resume=resume, units="questions", read=self._take
        )

    def _take(self, stats: dict[str, Any]) -> int:
        self.stats = Stats(**stats)
        return self.stats.questions

    @property
    def done(self) -> int:
        """Questions that are finished."""
        return self.stats.questions

    def add(self, judgement: Judgement, seconds: float) -> None:
        """Writes one question: its trace, what was rejected, and then that it is done.

        Raises:
            RunError: the disk does not take it; what is done stays done.
        """
        row = row_of(judgement)
        if row is not None:
            self._files.append(TRACES, row)
        for judged in judgement.samples:
            if not judged.verdict.accepted:
                self._files.append(QUARANTINE, {
                    "source": judgement.question.key, "sample": judged.sample.index, "reason": judged.verdict.reason,
                    "detail": judged.verdict.detail, "text": judged.text[:_QUARANTINED_CHARS],
                })  # fmt: skip
        self.stats.add(judgement)
        self.stats.seconds += seconds
        self._files.done(judgement.question.key, asdict(self.stats), self.stats.questions)

    def close(self) -> None:
        """Ends; the counts are in stats.json.

        Raises:
            RunError: the disk does not take them, and has not been complained of before.
        """
        figures = asdict(self.stats) | {"accept_rate": self.stats.rate}
        figures["tokens_per_s"] = self.stats.tokens / max(self.stats.seconds, 1e-9)
        self._files.close(figures)


def row_of(judgement: Judgement) -> dict[str, Any] | None:
    """A row of format `trace`; without a trace it teaches the known answer alone, and without either there is none."""
    question: Question = judgement.question
    if judgement.kept is None and question.gold is None:
        return None
    return {
        "conversation": [{"role": turn.role, "content": turn.content} for turn in question.turns],
        "trace": None if judgement.kept is None else to_fields(judgement.kept),
        "answer": question.gold,
        "source": question.key,
    }
