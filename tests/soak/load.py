"""Students that only pull: `python -m tests.soak.load ADDRESS --tenant A --streams 100 --depth 4 --seconds 10` prints JSON.

Every request is new to the server, so that nothing is answered from a store. Latencies are of answered requests, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.transport.channel import Credentials

_FOREVER_S = 1e6


@dataclass
class Tally:
    """What one process of students saw."""

    latencies: list[tuple[float, float]] = field(default_factory=list)  # when it was answered, how long it took
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    fingerprints: Counter[str] = field(default_factory=Counter)


def fresh_batch(rng: np.random.Generator, sequences: int, length: int, vocab: int = 64) -> TokenBatch:
    """Random tokens; two alike are out of the question."""
    ids = rng.integers(vocab, size=(sequences, length)).astype(np.int32)
    return TokenBatch.pack(ids.tolist())


async def student(
    client: TeacherClient, info: TeacherInfo, options: argparse.Namespace, seed: int, tally: Tally
) -> None:
    """One request after the other until the time is up."""
    rng = np.random.default_rng(seed)
    spec = spec_of("top_k", info.vocab_rows, k=options.k)
    end_s = time.monotonic() + options.seconds
    while time.monotonic() < end_s:
        batch = fresh_batch(rng, options.sequences, options.length, info.vocab_rows)
        began_s = time.monotonic()
        try:
            signals = await asyncio.wait_for(client.score(info, spec, batch), max(0.01, end_s - began_s))
            tally.latencies.append((time.time(), time.monotonic() - began_s))
            tally.tokens += batch.tokens
            tally.fingerprints[signals.fingerprint] += 1
        except TimeoutError:
            return
        except TeacherWireError as error:
            tally.errors[type(error).__name__] += 1
            if options.impatient:  # as one who does not know of retry delays
                await asyncio.sleep(options.impatient)


async def pull(options: argparse.Namespace) -> Tally:
    """All streams of this process."""
    tally = Tally()

    def trouble(error: TeacherWireError) -> None:
        tally.troubles[type(error).__name__] += 1

    clients = [
        TeacherClient(
            options.address, credentials=Credentials(tenant=options.tenant), on_trouble=trouble,
            retry_for_s=0.0 if options.impatient else _FOREVER_S,
        )
        for _ in range(options.streams)
    ]  # fmt: skip
    info = await clients[0].teacher(options.teacher, wait_for_s=10)
    work = [
        student(client, info, options, options.seed * 1_000_003 + i * 1009 + j, tally)
        for i, client in enumerate(clients)
        for j in range(options.depth)
    ]
    await asyncio.gather(*work)
    await asyncio.gather(*(client.close() for client in clients))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--tenant", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=4)
    for name, default in (("streams", 1), ("depth", 1), ("sequences", 8), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--impatient", type=float, default=0.0, help="never retry; ask again after so many seconds")
    tally = asyncio.run(pull(parser.parse_args()))
    print(json.dumps(vars(tally)))


if __name__ == "__main__":
    main()
