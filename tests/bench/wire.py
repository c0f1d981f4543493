"""The wire on one core: bytes and label tokens a second through the codec, and through gRPC on loopback.

Reference of the same run: copying the same bytes once (memcpy), the least any path can do.
    python -m tests.bench.wire [--json]
"""

from __future__ import annotations

import asyncio

import numpy as np

from teacher_wire import codec
from teacher_wire.client import TeacherClient
from teacher_wire.fake import FakeTeacher
from teacher_wire.loopback import serve
from teacher_wire.messages import ScoreCall, SignalSpec, TeacherInfo, TeacherSignals, Tensor, TokenBatch, float32
from teacher_wire.v1 import teacher_pb2 as pb
from tests.bench.table import arguments, seconds, show

TOKENS, WIDTH, VOCAB = 2048, 3584, 152_064  # one sequence of a 7B teacher


class Canned(FakeTeacher):
    """Answers every request with the same rows, so that only the wire takes time."""

    def __init__(self, answers: dict[str, TeacherSignals], info: TeacherInfo) -> None:
        super().__init__()
        self.answers = answers
        self.canned_info = info

    def teacher_info(self) -> TeacherInfo:
        return self.canned_info if hasattr(self, "canned_info") else super().teacher_info()

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return self.answers[call.spec.transport]


def answers() -> dict[str, TeacherSignals]:
    """Rows as a bf16 7B teacher gives them."""
    rng = np.random.default_rng(0)
    rows = TOKENS - 1
    two = {"lse_N": float32(rng.random(rows)), "label_logp_N": float32(-rng.random(rows))}
    bits = lambda *shape: Tensor("bfloat16", rng.integers(0, 1 << 14, shape, dtype=np.uint16))  # noqa: E731
    ids = Tensor("uint24", rng.integers(0, VOCAB, (rows, 64)).astype(np.uint32))
    top = {**two, "topk_ids_NK": ids, "topk_logits_NK": bits(rows, 64), "tail_logp_N": float32(-rng.random(rows))}
    return {
        "hidden": TeacherSignals.of({**two, "hidden_ND": bits(rows, WIDTH)}, "f"),
        "top_k": TeacherSignals.of(top, "f"),
    }


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__ or "")
    canned = answers()
    base = FakeTeacher().teacher_info()
    changes = {"name": "fake", "fingerprint": "f", "dtype": "bfloat16", "vocab_rows": VOCAB, "hidden_size": WIDTH}
    info = TeacherInfo(**{**vars(base), **changes})
    batch = TokenBatch.pack([[1] * TOKENS])
    rows = []
    for transport, k in (("hidden", 0), ("top_k", 64)):
        spec, signals = SignalSpec(transport, VOCAB, k=k), canned[transport]
        payload = signals.payload_bytes

        def copy(signals: TeacherSignals = signals) -> None:
            for tensor in signals.tensors().values():
                tensor.array.copy()

        def through_codec(signals: TeacherSignals = signals, spec: SignalSpec = spec) -> None:
            parts = []
            for chunk in codec.encode_chunks("r", 1, signals):
                data = pb.ScoreDown(chunk=chunk).SerializeToString()
                parts.append(codec.decode_chunk(pb.ScoreDown.FromString(data).chunk, spec, info))
            TeacherSignals.join(parts)

        reference = seconds(copy)
        with serve(Canned(canned, info)) as server:
            loop = asyncio.new_event_loop()
            client = TeacherClientOnLoop(loop, server.address)
            paths = {
                "one copy (reference)": reference,
                "encode + serialise + parse + decode + join": seconds(through_codec),
                "gRPC on loopback, 8 requests under way": seconds(lambda c=client, s=spec: c.score(info, s, batch, 8))
                / 8,
            }
            client.close()
        for path, took in paths.items():
            rows.append(
                {
                    "labels": f"{transport}{k or ''}",
                    "path": path,
                    "bytes/token": round(payload / signals.rows),
                    "MB/s": payload / took / 1e6,
                    "label tokens/s": float(round(signals.rows / took)),
                    "of one copy": reference / took,
                }
            )
    show(f"the wire, {TOKENS} tokens of a 7B teacher in bf16, one process", rows, as_json=options.json)


class TeacherClientOnLoop:
    """The async client, driven from outside its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self._loop = loop
        self._client = loop.run_until_complete(self._connect(address))

    async def _connect(self, address: str) -> TeacherClient:
        return TeacherClient(address, window_bytes=256 << 20)

    def score(self, info: TeacherInfo, spec: SignalSpec, batch: TokenBatch, count: int) -> None:
        """`count` requests at once."""

        async def ask() -> None:
            await asyncio.gather(*(self._client.score(info, spec, batch) for _ in range(count)))

        self._loop.run_until_complete(ask())

    def close(self) -> None:
        """Ends the client."""
        self._loop.run_until_complete(self._client.close())


if __name__ == "__main__":
    main()
