"""How fast a model reads and writes, and what memory that takes.

In: an engine and a text as ids; out: tokens per second of prefill and decode, for one sequence, and the peak of memory. Of a served teacher it is
what its user sees, network included, and its memory is its server's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil
import torch

from student_trainer.evaluation.tasks.engine import Engine, ServedEngine, StudentEngine
from student_trainer.inference.sampling import Sampling

PREFILL_TOKENS, DECODE_TOKENS, REPEATS = 512, 64, 3


@dataclass(frozen=True)
class Speed:
    """See module.

    Attributes:
        prefill_tokens_per_s, decode_tokens_per_s: of one sequence, the best of three.
        prefill_tokens, decode_tokens: that were measured with.
        peak_memory_bytes: allocated on the GPU, or resident of the process on a CPU; None of a served teacher.
        device: where.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_tokens: int
    decode_tokens: int
    peak_memory_bytes: int | None
    device: str

    def figures(self) -> dict[str, float | int | str | None]:
        """By name."""
        return asdict(self)


def measure_speed(engine: Engine, ids: Sequence[int]) -> Speed:
    """Reads a prompt and writes behind it, ends of text ignored.

    Args:
        engine: a student, or a served teacher.
        ids: of a text, repeated until it is long enough.

    Raises:
        StudentError, TeacherWireError: as `Engine.score` and `Engine.write`.
    """
    most = PREFILL_TOKENS + DECODE_TOKENS if engine.max_tokens is None else engine.max_tokens
    decode = min(DECODE_TOKENS, most // 4)
    if isinstance(engine, ServedEngine):
        decode = min(decode, engine.teacher.info.limits.max_new_tokens)
    prefill = max(2, min(PREFILL_TOKENS, most - decode - 1))
    text = (list(ids) * (prefill // len(ids) + 1))[:prefill]

    if isinstance(engine, ServedEngine):
        teacher = engine.teacher
        prefill_s = _best(lambda number: teacher.score([(_fresh(text, number)[:-1], text[-1:])]))
        # What the first token costs is left out, as of a student: written with one token, and with all.
        one_s = _best(lambda number: teacher.write([_fresh(text, number)], Sampling(max_new_tokens=1), ignore_ends=True))  # fmt: skip
        all_s = _best(lambda number: teacher.write([_fresh(text, number)], Sampling(max_new_tokens=decode + 1), ignore_ends=True))  # fmt: skip
        return Speed(prefill / prefill_s, decode / max(all_s - one_s, 1e-9), prefill, decode, None, "served")

    assert isinstance(engine, StudentEngine)
    student, writer = engine.student, engine.writer
    device = student.outline.device
    ids_1L = torch.tensor([text], device=device)

    @torch.no_grad()
    def read(_: int) -> None:
        student.head(student.vocab_rows).logits(student.states(ids_1L)[:, -1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with _peak(device) as peak:
        prefill_s = _best(read)
        one_s = _best(lambda _: writer.write([text], Sampling(max_new_tokens=1), ignore_ends=True))
        all_s = _best(lambda _: writer.write([text], Sampling(max_new_tokens=decode + 1), ignore_ends=True))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Speed(prefill / prefill_s, decode / max(all_s - one_s, 1e-9), prefill, decode, peak(), where)


def _best(work: Callable[[int], object]) -> float:
    """Seconds of the fastest of some tries; the first is left out, which loads kernels."""
    taken = []
    for number in range(REPEATS + 1):
        began_s = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - began_s)
    return min(taken[1:])


def _fresh(text: list[int], number: int) -> list[int]:
    """The text turned by some places: a server must not answer from what it has computed before."""
    turn = number % len(text)
    return text[turn:] + text[:turn]


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """What gives the peak of memory while the block runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    process, ended = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append(max(seen.pop(), process.memory_info().rss))

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        ended.set()
        thread.join()
