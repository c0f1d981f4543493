"""Revisions on their way to the server, in a thread of their own, one at a time.

In: the student's weights at a step; out: a live revision, or a line that says why not. Training waits for the copy of its weights and for
nothing else.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from student_trainer.errors import RunError, StudentError
from student_trainer.labels import event_loop
from student_trainer.labels.lineage import Lineage
from student_trainer.model.load import Student
from student_trainer.model.merged import MergedWriter, check_finite, merged_state
from teacher_wire.core.errors import MismatchError, TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.publish.messages import Publication, RevisionFile

FOLDER_NAME = ".publishing"
_LEAVE_S = 5.0
_HEARD_S, _LOOK_S = 10.0, 0.2


@dataclass(frozen=True)
class Target:
    """Where revisions go.

    Attributes:
        teacher: its name on the server.
        tokenizer_sha256: of the student's tokenizer.
        connect: makes a client of the server, on the event loop.
        fits: raises a StudentError for a teacher that the run could not learn from as it goes on.
    """

    teacher: str
    tokenizer_sha256: str
    connect: Callable[[], TeacherClient]
    fits: Callable[[TeacherInfo], None] = lambda info: None


@dataclass
class Counts:
    """What became of the revisions of a run: live, not live, and left out because the one before was still on its way."""

    live: int = 0
    failed: int = 0
    left_out: int = 0


class Publisher:
    """Publishes the student every so often.

    Args:
        student: whose weights.
        target: where to.
        folder: of the run; a subfolder holds the files while they are sent.
        lineage: told of every revision.
        tell: called with a sentence about every revision.
        stops: whether a revision that does not go live ends the run.

    Attributes:
        counts: so far.
    """

    def __init__(
        self,
        student: Student,
        target: Target,
        folder: Path,
        lineage: Lineage,
        tell: Callable[[str], None],
        *,
        stops: bool = False,
    ) -> None:
        self._student = student
        self._writer = MergedWriter(student)
        self._target = target
        self._folder = folder / FOLDER_NAME
        self._note = f"{folder.name}"[:40]
        self._lineage = lineage
        self._tell = tell
        self._stops = stops
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._under_way: Future[TeacherInfo] | None = None
        self._closed = False
        self.counts = Counts()
        shutil.rmtree(self._folder, ignore_errors=True)  # of a process that was killed

    def publish(self, step: int) -> None:
        """Begins to publish the weights as they are after `step` optimizer steps.

        Raises:
            RunError: an earlier one did not go live, and this is to end the run.
        """
        self.check()
        if self._thread is not None and self._thread.is_alive():
            self.counts.left_out += 1
            self._tell(
                f"step {step} is not published: the revision before is still on its way; set on_policy.publish.every higher"
            )
            return
        weights = merged_state(self._student, dtype=self._student.exported)
        self._lineage.coming(1)
        self._thread = threading.Thread(target=self._work, args=(step, weights), name="publisher", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunError if a revision did not go live, and this is to end the run."""
        if self._problem is not None and self._stops:
            problem, self._problem = self._problem, None
            raise RunError(f"on_policy.publish.on_failure=stop: {problem}") from problem

    def close(self, *, wait: bool) -> None:
        """Ends; with `wait` the revision under way goes live, or fails, before. Without it is taken back, if it is not deployed yet."""
        if not wait:
            self._closed = True
            if self._under_way is not None:
                self._under_way.cancel()
        if self._thread is not None:
            self._thread.join(None if wait else _LEAVE_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self, step: int, weights: dict[str, Tensor]) -> None:
        began_s = time.monotonic()
        try:
            check_finite(weights)
            self._writer.write(weights, self._folder, self._student.exported)
            weights.clear()
            revision, size = self._push(step)
            self.counts.live += 1
            took_s = time.monotonic() - began_s
            self._tell(
                f"step {step} is live as revision {revision[:12]} of {self._target.teacher} ({size / 2**20:,.1f} MiB, {took_s:.1f} s)"
            )
        except (StudentError, TeacherWireError, OSError) as error:
            self.counts.failed += 1
            self._problem = error
            self._stops = self._stops or isinstance(error, RunError)  # it is live, and cannot be learned from
            self._tell(f"step {step} is not published ({self.counts.failed} so far): {error}")
        except CancelledError:  # the run has ended
            self.counts.failed += 1
        except Exception as error:  # whatever it is, a thread must not end without a word
            self.counts.failed += 1
            self._problem = error
            self._tell(f"step {step} is not published ({self.counts.failed} so far): {type(error).__name__}: {error}")
        finally:
            self._lineage.coming(-1)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _push(self, step: int) -> tuple[str, int]:
        sources = sorted(self._folder.glob("model*.safetensors"))
        publication = Publication(
            self._target.teacher,
            (self._folder / "config.json").read_bytes(),
            self._target.tokenizer_sha256,
            tuple(RevisionFile.of(path) for path in sources),
            f"{self._note}, step {step}",
        )
        self._lineage.announce(step, publication.revision)
        if self._closed:
            raise CancelledError
        self._under_way = event_loop.start(self._live(publication, sources))
        info = self._under_way.result()
        self._target.fits(info)
        self._lineage.live(step, publication.revision, info)
        return publication.revision, publication.bytes

    async def _live(self, publication: Publication, sources: list[Path]) -> TeacherInfo:
        async with self._target.connect() as client:
            fingerprint = await client.publish(publication, sources)
            until_s = time.monotonic() + _HEARD_S
            info = await client.teacher(self._target.teacher)
            while info.fingerprint != fingerprint and time.monotonic() < until_s:  # another edge hears of it later
                await asyncio.sleep(_LOOK_S)
                info = await client.teacher(self._target.teacher)
        if info.fingerprint != fingerprint:
            raise MismatchError(
                "somebody else has published another revision since",
                field="fingerprint",
                value=info.fingerprint,
                limit=fingerprint,
            )
        return info
