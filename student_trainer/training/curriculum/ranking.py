"""The order of a run with a curriculum: measured when the run begins, kept in its folder, and taken from there when it goes on.

In: the config, the rows and the teachers; out: a `RunOrder`, and what of it is written down. run.json holds the constants and the digest of the
ranked rows; `curriculum.json` holds the rows themselves, since labels that are asked for again need not be the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import order_of
from student_trainer.files import read_object, write_whole
from student_trainer.teachers.session import TeacherSession
from student_trainer.training.curriculum.difficulty import difficulty, easy_to_hard
from student_trainer.training.curriculum.likelihood import likelihood_of
from student_trainer.training.curriculum.order import CurriculumOrder, Pace

FILE_NAME = "curriculum.json"  # in a run folder
IDENTITY = "curriculum"  # entry of run.json
FORMAT = 1


@dataclass(frozen=True)
class Ranking:
    """The curriculum of one run.

    Attributes:
        ranked: int64 [N], the rows by rising difficulty.
        score: float64 [N], their difficulty, by index.
        pace: the constants.
        measured_by: what the difficulty was made of, in words.
    """

    ranked: np.ndarray
    score: np.ndarray
    pace: Pace
    measured_by: str

    @property
    def identity(self) -> str:
        """What decides which rows come when, for run.json."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ranked, "<i8").tobytes()).hexdigest()
        return json.dumps({"ranked_sha256": digest, **asdict(self.pace)}, sort_keys=True)

    def keep(self, folder: Path) -> None:
        """Writes it into a run folder, whole.

        Raises:
            OSError: the disk does not take it.
        """
        content = {
            "format": FORMAT, "measured_by": self.measured_by, "pace": asdict(self.pace),
            "ranked": self.ranked.tolist(), "score": [round(float(one), 6) for one in self.score],
        }  # fmt: skip
        write_whole(folder / FILE_NAME, json.dumps(content))


def read_ranking(folder: Path) -> Ranking | None:
    """The curriculum of a run folder; None if there is none, or it is damaged."""
    try:
        found = read_object(folder / FILE_NAME)
        if found["format"] != FORMAT:
            return None
        ranked, score = np.array(found["ranked"], np.int64), np.array(found["score"], np.float64)
        if ranked.shape != score.shape or sorted(ranked.tolist()) != list(range(len(ranked))):
            return None
        return Ranking(ranked, score, Pace(**found["pace"]), str(found["measured_by"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_ranking(
    config: TrainConfig,
    sessions: Sequence[TeacherSession],
    data: TokenizedDataset,
    console: Console,
    kept: Ranking | None,
) -> Ranking | None:
    """The curriculum of a run; None without one.

    Args:
        kept: of the run that goes on, whose order and constants stay as they were; None for a new one. If its rows are others by now it is
            made anew, and run.json refuses to go on.
    """
    if config.curriculum is None:
        return None
    if kept is not None and len(kept.ranked) == len(data):
        return kept
    settings, asks = config.curriculum, config.loss.output is not None and config.curriculum.nll > 0
    examples = [row.example for row in data]
    tokens_N = np.array([example.token_ids.size for example in examples])
    steps_N = np.array([example.trace_steps for example in examples])
    likelihood = likelihood_of(config, sessions, data, console) if asks and sessions else None
    score_N = difficulty(settings, likelihood.nll_N if likelihood else None, tokens_N, steps_N)
    parts = []
    if likelihood is not None:
        unasked = int(np.isnan(likelihood.nll_N).sum())
        parts.append(
            f"{settings.nll:g} x NLL per token of {', '.join(session.name for session in sessions)} ({likelihood.read:,} of "
            f"{likelihood.of:,} tokens read{f'; {unasked:,} rows that no teacher is asked about count as the mean' if unasked else ''})"
        )
    parts += [f"{settings.length:g} x log length"] * bool(settings.length)
    parts += [f"{settings.trace_steps:g} x steps of traces"] * bool(settings.trace_steps and steps_N.any())
    whole = order_of(config, data).steps
    pace = Pace(settings.start, settings.power, settings.steps or max(1, math.ceil(whole / 2)), settings.mix)
    return Ranking(easy_to_hard(score_N, [example.key for example in examples]), score_N, pace, " + ".join(parts))


def run_order(
    config: TrainConfig, data: TokenizedDataset, ranking: Ranking | None, console: Console | None = None
) -> RunOrder:
    """Which rows each micro-batch of the run holds; `console` is told of a curriculum."""
    if ranking is None:
        return order_of(config, data)
    settings, pace = config.train, ranking.pace
    order = CurriculumOrder(
        ranking.ranked, pace, batch_size=settings.batch_size, accumulation=settings.accumulation,
        epochs=settings.epochs, max_steps=settings.max_steps, seed=config.run.seed,
    )  # fmt: skip
    if console is not None:
        told = (
            f"curriculum: {len(data):,} rows from easy to hard by {ranking.measured_by or 'nothing in which they differ'}; "
            f"{pace.eligible(0, len(data)):,} of them in step 0, all from step {pace.steps} of {order.steps}"
        )
        console.print(escape(told), soft_wrap=True)
        if pace.steps > order.steps:
            last = pace.eligible(order.steps - 1, len(data))
            console.print(
                f"[yellow]note:[/] curriculum.steps={pace.steps} is more than the run has: it ends with {last:,} rows let in"
            )
    return order
