"""What a run of traces leaves: traces.jsonl, quarantine.jsonl, progress.jsonl, stats.json; all appended, all resumable.

In: judgements in the order of the questions. A question counts once its line of progress is whole: on resumption everything
behind the last such line is cut off, so that no trace is there twice and none is missing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from student_trainer.errors import ConfigError, RunError
from student_trainer.traces.judge import Judgement
from student_trainer.traces.questions import Question
from teacher_wire.traces import REASONS, to_fields

TRACES, QUARANTINE, PROGRESS = "traces.jsonl", "quarantine.jsonl", "progress.jsonl"
STATS, IDENTITY = "stats.json", "run.json"
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
        ConfigError: the folder holds a run, and `resume` is false.
        RunError: the run there is another one.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self._folder = folder
        self.stats = Stats()
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir {folder}: is a file")
        known = folder / IDENTITY
        if known.is_file():
            if not resume:
                raise ConfigError(
                    f"output_dir {folder}: holds a run already; go on with --resume auto, or choose another folder"
                )
            _compare(json.loads(known.read_text()), identity)
            self._take_up()
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write_whole(known, json.dumps(identity, indent=1))
            except OSError as error:
                raise ConfigError(f"output_dir {folder}: cannot be written: {error.strerror}") from error
        self._files = {name: (folder / name).open("ab") for name in (TRACES, QUARANTINE, PROGRESS)}

    def _take_up(self) -> None:
        """Cuts off what is behind the last whole line of progress."""
        whole = b""
        last: dict[str, Any] = {"stats": {}, "bytes": {}}
        file = self._folder / PROGRESS
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
            if not line.endswith(b"\n"):
                break
            whole += line
            last = json.loads(line)
        sizes = {TRACES: 0, QUARANTINE: 0, **last["bytes"], PROGRESS: len(whole)}
        for name, size in sizes.items():
            path = self._folder / name
            if path.is_file():
                if path.stat().st_size < size:
                    raise RunError(f"{path}: shorter than when it was left; start another run")
                os.truncate(path, size)
            elif size:
                raise RunError(f"{path}: is gone; start another run")
        self.stats = Stats(**last["stats"])

    @property
    def done(self) -> int:
        """Questions that are finished."""
        return self.stats.questions

    def add(self, judgement: Judgement, seconds: float) -> None:
        """Writes one question: its trace, what was rejected, and then that it is done."""
        row = row_of(judgement)
        if row is not None:
            self._append(TRACES, row)
        for judged in judgement.samples:
            if not judged.verdict.accepted:
                self._append(QUARANTINE, {
                    "source": judgement.question.key, "sample": judged.sample.index, "reason": judged.verdict.reason,
                    "detail": judged.verdict.detail, "text": judged.text[:_QUARANTINED_CHARS],
                })  # fmt: skip
        self.stats.add(judgement)
        self.stats.seconds += seconds
        sizes = {name: self._files[name].tell() for name in (TRACES, QUARANTINE)}
        self._append(PROGRESS, {"source": judgement.question.key, "bytes": sizes, "stats": asdict(self.stats)})

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._files[name].flush()

    def close(self) -> None:
        """Ends; the counts are in stats.json."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        figures = asdict(self.stats) | {"accept_rate": self.stats.rate}
        figures["tokens_per_s"] = self.stats.tokens / max(self.stats.seconds, 1e-9)
        _write_whole(self._folder / STATS, json.dumps(figures, indent=1))


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


def _compare(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        told = ", ".join(f"{name}: {str(before.get(name))[:60]} -> {str(now.get(name))[:60]}" for name in changed[:4])
        raise RunError(f"the run was started with something else ({told}); start another run")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
