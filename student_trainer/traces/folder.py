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

from student_trainer.data.trace_schema import REASONS, to_fields
from student_trainer.errors import ConfigError, RunError
from student_trainer.files import LOCK_NAME, FolderLock, read_object, write_whole
from student_trainer.traces.questions import Question
from student_trainer.traces.selection import Judgement

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
        ConfigError: the folder holds a run, and `resume` is false; or files that are no run's; or it cannot be written.
        RunError: the run there is another one, its files are damaged, or another process is at work in it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self._folder = folder
        self._failed = False
        self._on_disk = 0  # questions
        self.stats = Stats()
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir {folder}: is a file")
        self._lock = FolderLock(folder)
        try:
            self._refuse_foreign(resume)
            self._lock.acquire()  # before anything is cut: the run there may still be going on
            self._open(identity)
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"output_dir {folder}: cannot be written: {error.strerror or error}") from error
        except BaseException:
            self._lock.release()
            raise

    def _refuse_foreign(self, resume: bool) -> None:
        """A folder is ours if it holds a run's identity; in any other that is not empty somebody's files would be written to."""
        ours = (IDENTITY, IDENTITY + ".partial", LOCK_NAME)
        there = sorted(path.name for path in self._folder.iterdir()) if self._folder.is_dir() else []
        if IDENTITY in there:
            if not resume:
                raise ConfigError(
                    f"output_dir {self._folder}: holds a run already; go on with --resume auto, or choose another folder"
                )
        elif foreign := [name for name in there if name not in ours]:
            raise ConfigError(
                f"output_dir {self._folder}: holds {foreign[0]} and no run ({IDENTITY} is not there); choose another folder"
            )

    def _open(self, identity: dict[str, Any]) -> None:
        known = self._folder / IDENTITY
        if known.is_file():
            try:
                before = read_object(known)
            except ValueError as error:
                raise RunError(f"{known}: {error}: nothing says what this run asked; start another one") from error
            _compare(before, identity)
            self._take_up()
        else:
            write_whole(known, json.dumps(identity, indent=1))
        self._files = {name: (self._folder / name).open("ab", buffering=0) for name in (TRACES, QUARANTINE, PROGRESS)}

    def _take_up(self) -> None:
        """Cuts off what is behind the last whole line of progress."""
        whole = b""
        last: dict[str, Any] = {"stats": {}, "bytes": {}}
        file = self._folder / PROGRESS
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.is_file() else [], 1):
            if not line.endswith(b"\n"):
                break
            whole += line
            try:
                last = json.loads(line)
                sizes, stats = {name: int(last["bytes"][name]) for name in (TRACES, QUARANTINE)}, Stats(**last["stats"])
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(f"{file}:{number}: damaged; start another run") from error
        if not whole:
            sizes, stats = {TRACES: 0, QUARANTINE: 0}, Stats()
        for name, size in {**sizes, PROGRESS: len(whole)}.items():
            path = self._folder / name
            if path.is_file():
                if path.stat().st_size < size:
                    raise RunError(f"{path}: shorter than when it was left; start another run")
                os.truncate(path, size)
            elif size:
                raise RunError(f"{path}: is gone; start another run")
        self.stats = stats
        self._on_disk = stats.questions

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
        self._on_disk = self.stats.questions

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        line = memoryview(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[self._files[name].write(line) :]
        except OSError as error:
            self._failed = True
            raise self._trouble(name, error) from error

    def _trouble(self, name: str, error: OSError) -> RunError:
        return RunError(
            f"{self._folder / name}: cannot be written: {error.strerror or error}; {self._on_disk:,} questions are done: make room and go on "
            "with --resume auto"
        )

    def close(self) -> None:
        """Ends; the counts are in stats.json.

        Raises:
            RunError: the disk does not take them, and has not been complained of before.
        """
        figures = asdict(self.stats) | {"accept_rate": self.stats.rate}
        figures["tokens_per_s"] = self.stats.tokens / max(self.stats.seconds, 1e-9)
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
            write_whole(self._folder / STATS, json.dumps(figures, indent=1))
        except OSError as error:
            if not self._failed:
                raise self._trouble(STATS, error) from error
        finally:
            for file in self._files.values():
                file.close()
            self._lock.release()


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
