"""A student that only pulls, as a process of its own: asks, checks what comes, and prints what it saw as JSON.

python -m tests.bench.gpu_client ADDRESS --transport top_k --lengths mixed --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from student_trainer.feed.verify import check_signals
from teacher_wire import codec
from teacher_wire.client import TeacherClient
from teacher_wire.messages import SignalSpec, TeacherInfo, TokenBatch

MIXED = (6.0, 0.9, 64, 2048)  # of the logarithm: mean and deviation; shortest and longest sequence
UNIFORM = 2048


def lengths(kind: str, rng: np.random.Generator, tokens: int) -> list[int]:
    """Sequence lengths of one request of `tokens` tokens."""
    if kind == "uniform":
        return [UNIFORM] * (tokens // UNIFORM)
    found: list[int] = []
    mean, deviation, shortest, longest = MIXED
    while sum(found) < tokens - shortest:
        found.append(int(np.clip(rng.lognormal(mean, deviation), shortest, min(longest, tokens - sum(found)))))
    return found


def fresh_batch(rng: np.random.Generator, kind: str, tokens: int, vocab: int) -> TokenBatch:
    """Random tokens; no two requests are alike."""
    found = lengths(kind, rng, tokens)
    cu_lengths_B1 = np.concatenate([[0], np.cumsum(found)]).astype(np.int32)
    wanted_T = np.ones(cu_lengths_B1[-1], np.bool_)
    wanted_T[cu_lengths_B1[1:] - 1] = False
    return TokenBatch(rng.integers(0, vocab, cu_lengths_B1[-1], dtype=np.int32), cu_lengths_B1, wanted_T)


class Timed:
    """Counts the seconds and calls of a function."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        began_s = time.thread_time()
        try:
            return self._function(*arguments, **named)
        finally:
            self.seconds += time.thread_time() - began_s


class TimedIterator(Timed):
    """The same for a function that yields."""

    def __call__(self, *arguments: Any, **named: Any) -> Iterator[Any]:
        iterator = self._function(*arguments, **named)
        while True:
            began_s = time.thread_time()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.thread_time() - began_s
            yield item


async def pull(options: argparse.Namespace) -> dict[str, Any]:
    """Keeps `depth` requests open until the time is up."""
    codec.decode_chunk, codec.finish_reply = Timed(codec.decode_chunk), Timed(codec.finish_reply)  # type: ignore[assignment]
    check = Timed(check_signals)
    answers: list[tuple[float, float, int]] = []  # when, how long it took, tokens
    stages: list[tuple[int, int, int]] = []
    async with TeacherClient(options.address, window_bytes=256 << 20) as client:
        info: TeacherInfo = await client.teacher(wait_for_s=60)
        spec = SignalSpec(options.transport, info.vocab_rows, k=options.k if options.transport == "top_k" else 0)
        end_s = time.monotonic() + options.seconds

        async def ask(seed: int) -> None:
            rng = np.random.default_rng((options.seed, seed))
            while (began_s := time.monotonic()) < end_s:
                batch = fresh_batch(rng, options.lengths, options.tokens, info.vocab_rows)
                signals = await client.score(info, spec, batch)
                check(signals, spec, batch, [str(b) for b in range(batch.sequences)])
                now_s = time.monotonic()
                answers.append((now_s, now_s - began_s, batch.tokens))
                stages.append((signals.timing.queue_us, signals.timing.forward_us, signals.timing.reduce_us))

        await asyncio.gather(*(ask(seed) for seed in range(options.depth)))
        return {
            "answers": answers,
            "stages": stages,
            "payload_bytes": client.stats.payload_bytes,
            "decode_s": codec.decode_chunk.seconds + codec.finish_reply.seconds,
            "verify_s": check.seconds,
            "cpu_s": time.process_time(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--transport", default="top_k")
    parser.add_argument("--lengths", default="uniform")
    for name, default in (("k", 64), ("tokens", 4096), ("depth", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=10.0)
    print(json.dumps(asyncio.run(pull(parser.parse_args()))))


if __name__ == "__main__":
    main()
