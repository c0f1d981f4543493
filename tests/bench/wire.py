"""The wire on one core: bytes and label tokens per second of CPU time, step by step, and through gRPC on loopback.

Reference of the same run: copying the same bytes once (memcpy), the least any path can do.
    OMP_NUM_THREADS=1 python -m tests.bench.wire [--json]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from student_trainer.labels.verify import check_signals
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.tensor import Tensor, float32
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score import codec
from teacher_wire.score.assembly import Assembly
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb
from tests.bench.table import arguments, cpu_seconds, show

TOKENS, WIDTH, VOCAB, KEPT = 2048, 3584, 152_064, 64  # sequences of a 7B teacher, two of them a request
SPECS = {"hidden": spec_of("hidden", VOCAB, check="sampled"), "top-64": spec_of("top_k", VOCAB, k=KEPT)}
UNDER_WAY = 8


class Canned(FakeTeacher):
    """Answers every request with the same rows, so that only the wire takes time."""

    def __init__(self, answers: dict[str, TeacherSignals], info: TeacherInfo) -> None:
        super().__init__()
        self.answers = answers
        self.canned_info = info

    def teacher_info(self) -> TeacherInfo:
        return self.canned_info if hasattr(self, "canned_info") else super().teacher_info()

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return self.answers[call.spec.name]


def request() -> TokenBatch:
    """Two sequences of random odd tokens."""
    rng = np.random.default_rng(1)
    return TokenBatch.pack([(rng.integers(0, VOCAB // 2, TOKENS) * 2 + 1).tolist() for _ in range(2)])


def answers(batch: TokenBatch) -> dict[str, TeacherSignals]:
    """Rows as a bf16 7B teacher gives them, which pass every check."""
    rng = np.random.default_rng(0)
    rows = batch.rows
    states = Tensor("bfloat16", rng.integers(0, 1 << 14, (rows, WIDTH), dtype=np.uint16))
    two = {"lse_N": float32(rng.random(rows)), "label_logp_N": float32(-rng.random(rows))}
    ids_NK = rng.permuted(np.tile(np.arange(0, VOCAB, VOCAB // 1024, np.uint32), (rows, 1)), axis=1)[:, :KEPT].copy()
    labels_N = batch.labels_N()
    ids_NK[::2, 3] = labels_N[::2]  # every second next token is among the kept, which are even otherwise
    bits_NK = np.sort(rng.normal(0, 2, (rows, KEPT)).astype(np.float32))[:, ::-1].copy().view(np.uint32) >> 16
    logits_NK = Tensor("bfloat16", bits_NK.astype(np.uint16))
    values_NK = logits_NK.as_float32()
    lse_N = np.log(np.exp(values_NK.astype(np.float64)).sum(1) / 0.9)
    label_N = np.where(ids_NK[:, 3] == labels_N, values_NK[:, 3] - lse_N, -30.0)
    top = {
        "lse_N": float32(lse_N),
        "label_logp_N": float32(label_N),
        "topk_ids_NK": Tensor("uint24", ids_NK),
        "topk_logits_NK": logits_NK,
        "tail_logp_N": float32(np.full(rows, np.log(0.1))),
    }
    return {
        "hidden": TeacherSignals({**two, "hidden_ND": states}, "f").sampled(batch),
        "top_k": TeacherSignals(top, "f"),
    }


def steps(
    signals: TeacherSignals, spec: SignalSpec, batch: TokenBatch, info: TeacherInfo
) -> dict[str, Callable[[], object]]:
    """What happens to an answer on its way, each step by itself and all of the codec's together."""
    call = ScoreCall("r", info.name, info.fingerprint, spec, batch)
    on_the_wire = [data for data, _ in codec.encode_chunks(call, 1, signals)]
    downs = [pb.ScoreDown.FromString(data) for data in on_the_wire]
    done = pb.ScoreDone(rows=signals.rows, chunks=len(downs), fingerprint="f")

    def decode(messages: list[pb.ScoreDown]) -> TeacherSignals:
        answer = Assembly(call, info)
        for down in messages:
            codec.decode_chunk(down.chunk, answer)
        return codec.finish_reply(answer, done, call)

    def through_codec() -> TeacherSignals:
        answer = Assembly(call, info)
        for data, _ in codec.encode_chunks(call, 1, signals):
            codec.decode_chunk(pb.ScoreDown.FromString(data).chunk, answer)
        return codec.finish_reply(answer, done, call)

    arrived = through_codec()
    for name, tensor in signals.tensors.items():
        np.testing.assert_array_equal(arrived.tensors[name].array, tensor.array)
    return {
        "one copy (reference)": lambda: [tensor.array.copy() for tensor in signals.tensors.values()],
        "encode": lambda: list(codec.encode_chunks(call, 1, signals)),
        "parse": lambda: [pb.ScoreDown.FromString(data) for data in on_the_wire],
        "decode into the whole answer": lambda: decode(downs),
        "all three": through_codec,
        "verify (check_signals)": lambda: check_signals(arrived, spec, batch, ["a", "b"]),
    }


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__ or "")
    batch = request()
    canned = answers(batch)
    base = FakeTeacher().teacher_info()
    changes = {"name": "fake", "fingerprint": "f", "dtype": "bfloat16", "vocab_rows": VOCAB, "hidden_size": WIDTH}
    info = TeacherInfo(**{**vars(base), **changes})
    rows: list[dict[str, object]] = []
    for labels, spec in SPECS.items():
        signals = canned[spec.name]
        took = {step: cpu_seconds(work) for step, work in steps(signals, spec, batch, info).items()}
        with serve(Canned(canned, info)) as server:
            client = TeacherClientOnLoop(asyncio.new_event_loop(), server.address)
            least_s, median_s = cpu_seconds(
                lambda c=client, s=spec: c.score(info, s, batch, UNDER_WAY), clock=time.process_time
            )
            took[f"gRPC on loopback, both sides, {UNDER_WAY} under way"] = least_s / UNDER_WAY, median_s / UNDER_WAY
            client.close()
        reference_s = took["one copy (reference)"][0]
        for step, (least_s, median_s) in took.items():
            rows.append(
                {
                    "labels": labels,
                    "step": step,
                    "ms, least": least_s * 1e3,
                    "median": median_s * 1e3,
                    "MB/s": signals.payload_bytes / least_s / 1e6,
                    "M label tokens/s": signals.rows / least_s / 1e6,
                    "copies": least_s / reference_s,
                }
            )
    title = f"the wire: {signals.rows} label tokens of a 7B teacher in bf16, CPU time of one core (MB/s and on: of the least)"
    show(title, rows, as_json=options.json)


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
