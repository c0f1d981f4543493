"""A student that only pulls, as a process of its own: asks, checks what comes, and prints what it saw as JSON.

python -m tests.bench.gpu_client ADDRESS --transport top_k --lengths mixed --seconds 10
Also how the benches start such processes, and what they make of what these saw.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from student_trainer.labels.verify import check_signals
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.info import TeacherInfo
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of

MIXED = (6.0, 0.9, 64, 2048)  # of the logarithm: mean and deviation; shortest and longest sequence
UNIFORM = 2048
Figures = dict[str, object]
Seen = list[dict[str, Any]]
_seeds = itertools.count()  # no two processes of a run ask for the same: the edge would answer from its memory


def lengths(kind: str, rng: np.random.Generator, tokens: int) -> list[int]:
    """Sequence lengths of one request of `tokens` tokens."""
    if kind == "uniform":
        return [min(UNIFORM, tokens)] * max(1, tokens // UNIFORM)
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
    shares: list[
        tuple[float, int]
    ] = []  # of the device's time for the whole batch, by tokens, microseconds; tokens of that batch
    async with TeacherClient(options.address, window_bytes=256 << 20) as client:
        info: TeacherInfo = await client.teacher(wait_for_s=60)
        settings = {"k": options.k} if options.transport == "top_k" else {}
        rows = "sampled" if options.transport == "hidden" else "all"  # as students ask by default
        spec = spec_of(options.transport, info.vocab_rows, rows, **settings)
        end_s = time.monotonic() + options.seconds

        async def ask(seed: int) -> None:
            rng = np.random.default_rng((options.seed, seed))
            while (began_s := time.monotonic()) < end_s:
                batch = fresh_batch(rng, options.lengths, options.tokens, info.vocab_rows)
                signals = await client.score(info, spec, batch)
                check(signals, spec, batch, [str(b) for b in range(batch.sequences)])
                now_s = time.monotonic()
                answers.append((now_s, now_s - began_s, batch.tokens))
                timing = signals.timing
                stages.append((timing.queue_us, timing.forward_us, timing.reduce_us))
                busy_us = (timing.forward_us + timing.reduce_us) * batch.tokens / timing.batch_tokens
                shares.append((busy_us, timing.batch_tokens))

        await asyncio.gather(*(ask(seed) for seed in range(options.depth)))
        return {
            "answers": answers,
            "stages": stages,
            "shares": shares,
            "payload_bytes": client.stats.payload_bytes,
            "decode_s": codec.decode_chunk.seconds + codec.finish_reply.seconds,
            "verify_s": check.seconds,
            "cpu_s": time.process_time(),
        }


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def pull_by_processes(
    address: str, transport: str, lengths: str, clients: int, depth: int, seconds: float, tokens: int = 4096
) -> Seen:
    """What so many such processes saw, each with `depth` requests open."""
    command = [sys.executable, "-m", "tests.bench.gpu_client", address, "--depth", str(depth), "--tokens", str(tokens)]
    command += ["--transport", transport, "--lengths", lengths, "--seconds", str(seconds)]
    processes = [
        await asyncio.create_subprocess_exec(*command, "--seed", str(next(_seeds)), stdout=subprocess.PIPE)
        for _ in range(clients)
    ]
    try:
        async with asyncio.timeout(seconds + 120):
            return [json.loads((await process.communicate())[0]) for process in processes]
    finally:  # one that failed must not leave the others asking
        for process in processes:
            if process.returncode is None:
                process.kill()


def window(seen: Seen) -> tuple[float, float]:
    """When all clients asked, without the first two batches and the last."""
    return max(client["answers"][0][0] for client in seen) + 1.0, min(client["answers"][-1][0] for client in seen)


def seen_by_clients(seen: Seen) -> Figures:
    """Rates while all clients ask; how long the GPU had nothing to do comes from the timing in each answer."""
    start_s, end_s = window(seen)
    answers = sorted(
        (when, tokens, *share)
        for client in seen
        for (when, _, tokens), share in zip(client["answers"], client["shares"], strict=True)
        if start_s < when < end_s
    )
    times = np.array([when for when, *_ in answers])
    # Answers come in lumps of a batch: the slope of a line through them, not the sum between two of them.
    label_rate = np.polyfit(times, np.cumsum([tokens for _, tokens, *_ in answers]), 1)[0]
    busy_rate = np.polyfit(times, np.cumsum([busy_us for _, _, busy_us, _ in answers]), 1)[0] / 1e6
    every = sum(tokens for client in seen for _, _, tokens in client["answers"])
    return {
        "label tokens/s": float(round(label_rate)),
        "GPU idle": 1 - float(busy_rate),
        "tokens a batch": float(np.average([size for *_, size in answers], weights=[1 / size for *_, size in answers])),
        "bytes/token": sum(client["payload_bytes"] for client in seen) / every,
        "median latency ms": statistics.median(1e3 * took for client in seen for _, took, _ in client["answers"]),
    }


def quiet_stages(seen: Seen, server_ms: Mapping[str, float]) -> Figures:
    """Milliseconds of each stage of a request when nobody else asks; the last is what no other stage explains.

    Args:
        seen: by the one client.
        server_ms: what is known of the server beside the timing in the answers.
    """
    (client,) = seen
    answers, stages = client["answers"][2:], client["stages"][2:]
    asked = len(client["answers"])
    queue, forward, reduce = (statistics.median(stage) / 1e3 for stage in zip(*stages, strict=True))
    spent = {
        "queue": queue,
        "forward": forward,
        "reduce": reduce,
        **server_ms,
        "decode": client["decode_s"] / asked * 1e3,
        "verify": client["verify_s"] / asked * 1e3,
    }
    whole = statistics.median(took for _, took, _ in answers) * 1e3
    return {**spent, "copy, wire, rest": whole - sum(spent.values()), "whole ms": whole}


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
