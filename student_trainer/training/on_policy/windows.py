"""Windows in which some sequences are the student's own: those of the data in their order, with rollouts in the places that the plan names.

In: the data's order, prompts, a writer of rollouts; out: windows for the trainer, and requests for the feed as soon as they are written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import IndexedExample
from student_trainer.errors import RunError
from student_trainer.labels.source import LabelRequest
from student_trainer.rollout.examples import RolloutExample, example_of
from student_trainer.rollout.figures import RolloutFigures
from student_trainer.rollout.ledger import Ledger
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.prompts import Prompts
from student_trainer.rollout.sample import RolloutFailure
from student_trainer.rollout.writer import RolloutWriter, Written
from student_trainer.training.windows import MicroBatch, Window


class RolloutWindows:
    """A `WindowSource`; see module.

    Args:
        order: of the data.
        plan, prompts, writer: of the rollouts.
        ledger: told of every rollout that the trainer takes.
        figures: told likewise.
        stops: a prompt that gets no completion ends the run; else its row is learned from instead.
        note: called with a sentence about the first such prompt.

    Attributes:
        waited_s: seconds that `window` has waited for rollouts.
    """

    def __init__(
        self,
        order: RunOrder,
        plan: RolloutPlan,
        prompts: Prompts,
        writer: RolloutWriter,
        ledger: Ledger,
        figures: RolloutFigures,
        *,
        stops: bool,
        note: Callable[[str], None],
    ) -> None:
        self.steps = order.steps
        self.accumulation = order.accumulation
        self.batch_size = order.batch_size
        self.batches = order.batches
        self.waited_s = 0.0
        self._order = order
        self._plan = plan
        self._prompts = prompts
        self._writer = writer
        self._ledger = ledger
        self._figures = figures
        self._stops = stops
        self._note = note
        self._noted = False
        self._made: dict[int, Window] = {}
        self._lock = threading.Lock()

    def window(self, step: int) -> Window:
        """See `WindowSource`; waits until the rollouts of the step are written.

        Raises:
            RolloutError: the engine is gone.
            RunError: a prompt got no completion, and that is to end the run; or the ledger cannot be written.
        """
        began_s = time.perf_counter()
        written = self._writer.take(step)
        self.waited_s += time.perf_counter() - began_s
        window = self._window(step)
        failed = [one for one in written if isinstance(one, RolloutFailure)]
        if failed and not self._noted:
            self._noted = True
            self._note(f"{_told(failed[0])}; the row is learned from instead, and such rows are counted in the log")
        self._ledger.add(written)
        self._figures.add(self._plan.window, written)
        return window

    def request(self, number: int) -> LabelRequest:
        """See `WindowSource`."""
        return self.micro_batch(number).request

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number`, for the feed; waits until it is written. Raises as `window`."""
        step, place = divmod(number, self.accumulation)
        return self._window(step).batches[place]

    def epoch_at(self, step: int) -> float:
        """See `WindowSource`."""
        return self._order.epoch_at(step)

    def forget(self, step: int) -> None:
        """Windows before `step` are over."""
        with self._lock:
            for over in [made for made in self._made if made < step]:
                del self._made[over]

    def close(self) -> None:
        """See `WindowSource`."""
        self._writer.close()

    def _window(self, step: int) -> Window:
        written = self._writer.take(step)
        with self._lock:  # trainer and feed get the same
            if step not in self._made:
                self._made[step] = self._make(step, written)
            return self._made[step]

    def _make(self, step: int, written: Written) -> Window:
        rows = [self._prompts.row(step, slot) for slot in range(self._plan.window)]
        places = self._plan.places(step)
        for place, one in zip(places, written, strict=True):
            if isinstance(one, RolloutFailure):
                if self._stops:
                    raise RunError(f"{_told(one)} (on_policy.on_failure=stop)")
                continue
            row = self._prompts.row(step, place.row)
            rows[place.slot] = IndexedExample(row.index, example_of(one, row.example))
        first = step * self.accumulation
        return Window(
            step,
            tuple(
                _batch(first + b, rows[b * self.batch_size : (b + 1) * self.batch_size])
                for b in range(self.accumulation)
            ),
        )


def _batch(number: int, rows: Sequence[IndexedExample]) -> MicroBatch:
    """A micro-batch that says which of its sequences nobody will ask about again."""
    batch = MicroBatch.of(number, rows)
    fresh = frozenset(b for b, row in enumerate(rows) if isinstance(row.example, RolloutExample))
    return replace(batch, request=replace(batch.request, fresh=fresh)) if fresh else batch


def _told(failed: RolloutFailure) -> str:
    return f"on_policy: {failed.prompt.key} (step {failed.prompt.step}, place {failed.prompt.slot}) got no completion: {failed.why}"
