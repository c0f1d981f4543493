"""The product's edge in a process of its own, before a teacher that takes a forward pass's time and no processor.

In: port, tokens file, certificate and key; out: a line "ready". So that what a tenant's latency shows is the edge.
    python -m tests.faults.noisy_server PORT TOKENS CERT KEY
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from teacher_server.config.server import EdgeConfig, StoreConfig, TlsConfig
from teacher_server.edge.server import EdgeServer
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import Limits, TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import DTYPES, Tensor
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.testing.fake_teacher import FakeTeacher

FORWARD_S = 0.04  # of a small request to a 7B teacher
TOKENS_PER_S = 100_000
VOCAB = 4096
STEP_S = 0.02  # of one written token
LIMITS = Limits(4096, 65_536, 1024, 4096, 64 << 20, 4096, 64, 1 << 20, 65_536)  # those of a teacher as configured


class PacedTeacher(FakeTeacher):
    """Zeros of the right shapes after the time that a forward pass takes."""

    def __init__(self) -> None:
        super().__init__(vocab_rows=VOCAB, hidden_size=64)
        self._info = replace(super().teacher_info(), limits=LIMITS)

    def teacher_info(self) -> TeacherInfo:
        return self._info if hasattr(self, "_info") else super().teacher_info()

    async def score(self, call: ScoreCall) -> TeacherSignals:
        await asyncio.sleep(FORWARD_S + call.batch.tokens / TOKENS_PER_S)
        rows = call.batch.rows
        zeros = {
            part.name: Tensor(part.dtype, np.zeros((rows, *part.entry), DTYPES[part.dtype][0]))
            for part in call.spec.fields_of(self._info)
        }
        return TeacherSignals(zeros, self._info.fingerprint)

    async def generate(self, call: GenerateCall):
        for prompt, index in call.wanted():
            count = min(call.spec.max_new_tokens, 16)
            await asyncio.sleep(STEP_S * count)
            yield Sample(prompt, index, np.ones(count, np.int32), np.zeros(count, np.float32), "stop")


async def main(port: str, tokens: str, cert: str, key: str) -> None:
    """Serves until it is killed."""
    config = EdgeConfig(
        port=int(port),
        tokens_file=Path(tokens),
        tls=TlsConfig(cert_file=Path(cert), key_file=Path(key)),
        store=StoreConfig(memory_mb=16),  # labels that are kept are no leak, but would look like one
    )
    server = EdgeServer(config, PacedTeacher())
    await server.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
