"""The pipeline: one thread writes the rollouts of coming steps while the trainer is at an earlier one.

In: a plan, prompts, a sampler, weights as they are made; out: the rollouts of a step, each written with the weights that the plan names for
it, neither older nor newer. What waits here is woken by what went wrong in the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from student_trainer.errors import RolloutError
from student_trainer.interruption import guarded, patiently
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.prompts import Prompts
from student_trainer.rollout.sample import Rollout, RolloutFailure, Sampler
from teacher_wire.core.errors import CancelledRequestError

Written = list[Rollout | RolloutFailure]


@dataclass(frozen=True, eq=False)
class _Weights:
    """Trained parameters of one version; `arrived` is when the device has them, None if it has."""

    named: Mapping[str, Tensor]
    arrived: torch.cuda.Event | None


class RolloutWriter:
    """See module. `weights_are` is to be called at the start of the run, and after each optimizer step.

    Args:
        plan: which places, with which weights.
        prompts: of the rows of each step.
        sampler: used by the thread alone; closed here.
    """

    def __init__(self, plan: RolloutPlan, prompts: Prompts, sampler: Sampler) -> None:
        self._plan = plan
        self._prompts = prompts
        self._sampler = sampler
        self._changed = threading.Condition()
        self._weights: dict[int, _Weights] = {}
        self._written: dict[int, Written] = {}
        self._next: int | None = None  # the step to be written; None before there are weights
        self._version = -1
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def version(self) -> int:
        """Of the student that trains; -1 before it is known."""
        return self._version

    def restore(self, pending: Mapping[int, Written]) -> None:
        """Takes rollouts that were written before the run was interrupted; before the first `weights_are`."""
        self._written.update(pending)

    @guarded()
    def weights_are(self, version: int, trained: Mapping[str, Tensor]) -> None:
        """The student has made `version` optimizer steps and these are its parameters; they are copied if they may change before they are read.

        Steps before `version` are over: their rollouts are forgotten.
        """
        steps = [step for step in self._plan.writers(version) if step not in self._written]
        weights = _kept(trained, copied=any(step > version for step in steps)) if steps else None
        with self._changed:
            self._version = version
            for step in [step for step in self._written if step < version]:
                del self._written[step]
            if weights is not None:
                self._weights[version] = weights
            if self._next is None:
                self._next = version
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()

    @guarded()
    def take(self, step: int) -> Written:
        """The rollouts of a step, in the order of its places, once they are written; may be asked for again until the step is over.

        Raises:
            RolloutError: the engine is gone, or has no memory.
            CancelledRequestError: the writer was closed.
        """
        if not self._plan.places(step):
            return []
        with self._changed:
            patiently(partial(self._changed.wait_for, lambda: step in self._written or self._error or self._closed))
            if step in self._written:
                return self._written[step]
            raise self._error or CancelledRequestError("the source of rollouts was closed")

    def pending(self) -> dict[int, Written]:
        """Rollouts of steps not yet made whose weights are gone: what a resumed run cannot write again. Waits until they are written.

        Raises:
            RolloutError, CancelledRequestError: as `take`.
        """
        steps = range(self._version, self._plan.steps)
        gone = [step for step in steps if self._plan.version(step) < self._version and self._plan.places(step)]
        return {step: self.take(step) for step in gone}

    def close(self) -> None:
        """Ends thread and sampler, and wakes whoever waits; may come twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._sampler.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)

    def _run(self) -> None:
        try:
            loaded = -1
            while (task := self._wait_for_task()) is not None:
                step, version, weights = task
                if loaded != version:
                    if weights.arrived is not None:
                        weights.arrived.synchronize()
                    self._sampler.load(weights.named, version)
                    loaded = version
                self._finish(step, version, self._write(step))
        except BaseException as error:  # whoever waits is told
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _write(self, step: int) -> Written:
        prompts, refused = self._prompts.of(step), self._prompts.hindrances(step)
        written = iter(self._sampler.sample([p for p, why in zip(prompts, refused, strict=True) if not why]))
        return [RolloutFailure(p, why) if why else next(written) for p, why in zip(prompts, refused, strict=True)]

    def _wait_for_task(self) -> tuple[int, int, _Weights] | None:
        """The next step to be written, its version and weights; None when there is nothing more to write."""
        with self._changed:
            while not self._closed:
                assert self._next is not None
                while self._next < self._plan.steps and (
                    self._next in self._written or not self._plan.places(self._next)
                ):
                    self._next += 1
                if self._next >= self._plan.steps:
                    return None
                version = self._plan.version(self._next)
                if version in self._weights:
                    return self._next, version, self._weights[version]
                if version <= self._version:
                    raise RolloutError(
                        f"rollouts of step {self._next} need the weights of step {version}, and these are gone"
                    )
                self._changed.wait()
            return None

    def _finish(self, step: int, version: int, written: Written) -> None:
        with self._changed:
            self._written[step] = written
            if not any(later > step for later in self._plan.writers(version)):
                del self._weights[version]
            self._changed.notify_all()


def _kept(trained: Mapping[str, Tensor], *, copied: bool) -> _Weights:
    named = {name: tensor.detach().clone() if copied else tensor.detach() for name, tensor in trained.items()}
    arrived = None
    if any(tensor.is_cuda for tensor in named.values()):
        arrived = torch.cuda.Event()
        arrived.record()
    return _Weights(named, arrived)
