"""A teacher in forty lines of numpy that speaks the real wire: for tests, examples and first steps without a GPU.

Deterministic and causal: the state at token t depends on tokens 0..t and the seed, and on no other sequence of a request. `mistake` makes it
answer wrongly in one named way, so that a student's refusals can be tested.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from teacher_wire.artifacts.kinds.byte_table import to_artifact
from teacher_wire.artifacts.kinds.output_head import TeacherHead
from teacher_wire.artifacts.messages import Artifact, ArtifactCall, ArtifactHeader
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.errors import CapabilityError, MismatchError, NotFoundError, ServerError
from teacher_wire.core.info import Limits, TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.tensor import Tensor, float32, token_id_dtype
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.score.signals import Full, Given, Hidden, TopK
from teacher_wire.testing.fake_features import FAKE_FEATURES, FakeBlocks, pack_state
from teacher_wire.testing.fake_generation import FakeWriter
from teacher_wire.testing.fake_tokenizer import RowTokenizer
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow

MISTAKES = ("", "shifted", "truncated", "nan", "foreign", "unsorted", "duplicate", "mass", "state", "crash")


@dataclass
class FakeTeacher:
    """A `TeacherService` with one teacher.

    Attributes:
        vocab_rows, hidden_size, seed, layers: its shape and weights.
        basis_rank: of what it projects states of its layers on; 0 if it does not.
        delay_s: pause before each answer.
        mistake: one of MISTAKES.
        writer: answers Generate.
        reader: answers Tokenize; without one it is not offered. `FakeTokenizer` needs nothing but this package. `tokenizer_sha256` and
            `chat_template_sha256` are the reader's where they are not given.
        calls, tokens: what it has been asked so far.
        tokenize_calls: of Tokenize, so far.
    """

    name: str = "fake"
    vocab_rows: int = 64
    hidden_size: int = 16
    seed: int = 0
    delay_s: float = 0.0
    mistake: str = ""
    tokenizer_sha256: str = ""
    chat_template_sha256: str = ""
    base_tokenizer_sha256: str = ""
    added_tokens: str = ""
    max_reply_bytes: int = 32 << 20
    layers: int = 1
    basis_rank: int = 0
    writer: FakeWriter = field(default_factory=FakeWriter)
    reader: RowTokenizer | None = None
    calls: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    tokenize_calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.mistake not in MISTAKES:
            raise ValueError(f"mistake must be one of {'|'.join(MISTAKES)}, not {self.mistake!r}")
        if self.reader is not None:
            if len(self.reader.table) > self.vocab_rows:
                raise ValueError(
                    f"vocab_rows must hold the reader's {len(self.reader.table)} ids, not {self.vocab_rows}"
                )
            self.tokenizer_sha256 = self.tokenizer_sha256 or self.reader.tokenizer_sha256
            self.chat_template_sha256 = self.chat_template_sha256 or self.reader.chat_template_sha256
        rng = np.random.default_rng(self.seed)
        self.embedding_VD = rng.standard_normal((self.vocab_rows, self.hidden_size)).astype(np.float32)
        self.weight_VD = rng.standard_normal((self.vocab_rows, self.hidden_size)).astype(np.float32)
        self.kv_width = max(1, self.hidden_size // 2)
        self.blocks = FakeBlocks(self.layers, self.hidden_size, self.kv_width, self.seed)
        self.basis = self.blocks.basis(self.basis_rank) if self.basis_rank else None

    def teacher_info(self) -> TeacherInfo:
        more = b"" if self.layers == 1 else f"{self.layers} layers".encode()
        return TeacherInfo(
            name=self.name,
            model="fake",
            fingerprint=hashlib.sha256(self.embedding_VD.tobytes() + self.weight_VD.tobytes() + more).hexdigest(),
            architecture="FakeTeacher",
            dtype="float32",
            vocab_rows=self.vocab_rows,
            tokenizer_size=self.vocab_rows,
            tokenizer_sha256=self.tokenizer_sha256,
            chat_template_sha256=self.chat_template_sha256,
            hidden_size=self.hidden_size,
            layers=self.layers,
            artifacts=tuple(artifact.info for artifact in self.artifacts()),
            transports=(*FAKE_SIGNALS, *FAKE_FEATURES),
            deterministic=True,
            limits=Limits(
                4096,
                65536,
                256,
                self.vocab_rows,
                self.max_reply_bytes,
                **self.writer.limits,
                **({} if self.reader is None else {"max_tokenize_bytes": 1 << 20, "max_tokenize_rows": 256}),
            ),
            generates=self.writer.generates,
            base_tokenizer_sha256=self.base_tokenizer_sha256,
            added_tokens=self.added_tokens,
            kv_width=self.kv_width,
            basis_rank=self.basis_rank,
            basis_layers=tuple(range(self.layers + 1)) if self.basis_rank else (),
        )

    async def describe(self) -> list[TeacherInfo]:
        return [self.teacher_info()]

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        if teacher not in ("", self.name):
            raise NotFoundError("no such teacher", field="teacher", value=teacher, limit=self.name)
        return self.teacher_info()

    async def score(self, call: ScoreCall) -> TeacherSignals:
        self.calls += 1
        self.tokens += call.batch.tokens
        await asyncio.sleep(self.delay_s)
        if self.mistake == "crash":
            raise ServerError("the fake was told to crash")
        signals = self.signals(call.spec, call.batch)
        return _spoil(replace(signals, fingerprint=self.teacher_info().fingerprint), self.mistake)

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        return self.writer.samples(call, self.vocab_rows)

    def artifacts(self) -> tuple[Artifact, ...]:
        """What it gives away: its output head, what it projects states on, and its byte table."""
        given = [TeacherHead(float32(self.weight_VD)).artifact()]
        if self.basis is not None:
            given.append(self.basis.artifact())
        if self.reader is not None:
            given.append(to_artifact(self.reader.table.padded(self.vocab_rows)))
        return tuple(given)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        """Raises CapabilityError without a reader."""
        if self.reader is None:
            raise CapabilityError("this fake has no reader", field="Tokenize")
        if call.fingerprint not in ("", self.teacher_info().fingerprint):
            raise MismatchError("other weights", field="fingerprint", value=call.fingerprint)
        self.tokenize_calls += 1
        await asyncio.sleep(self.delay_s)
        return self.reader.rows(call.rows)

    def artifact(self, call: ArtifactCall) -> Artifact:
        """Raises CapabilityError if it has no such one."""
        for artifact in self.artifacts():
            if (artifact.header.kind, artifact.header.sha256) == (call.kind, call.sha256):
                return artifact
        there = "|".join(f"{artifact.header.kind} {artifact.header.sha256}" for artifact in self.artifacts())
        raise CapabilityError(
            "no such artifact here", field="artifact", value=f"{call.kind} {call.sha256}"[:100], limit=there
        )

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        return self.artifact(call).header

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return self.artifact(call).slice(offset, size)

    def states(self, batch: TokenBatch) -> np.ndarray:
        """float32 [T, D]: a small recurrence over each sequence."""
        states_TD = np.empty((batch.tokens, self.hidden_size), np.float32)
        for start, stop in zip(batch.cu_lengths_B1[:-1], batch.cu_lengths_B1[1:], strict=True):
            state_D = np.zeros(self.hidden_size, np.float32)
            for t in range(start, stop):
                state_D = np.tanh(self.embedding_VD[batch.token_ids_T[t]] + 0.5 * np.roll(state_D, 1))
                states_TD[t] = state_D
        return states_TD

    def signals(self, spec: SignalSpec, batch: TokenBatch) -> TeacherSignals:
        """The right answer, in float32."""
        rows_N = batch.rows_of()
        hidden_ND = self.states(batch)[rows_N]
        hidden = spec.find(Hidden)
        packed = None
        if hidden is not None and hidden.reduction == "int8":
            packed, hidden_ND = pack_state(hidden_ND)
        # A product may round by how many rows it has: each sequence's by itself, so that company changes nothing.
        parts = np.split(hidden_ND, np.searchsorted(rows_N, batch.cu_lengths_B1[1:-1]))
        logits_NV = np.concatenate([part_ND @ self.weight_VD[: spec.vocab_rows].T for part_ND in parts])
        rows = FakeRows(batch, hidden_ND, logits_NV, _lse(logits_NV), packed)
        label_N = logits_NV[np.arange(batch.rows), batch.labels_N()] - rows.lse_N
        if spec.check == "sampled":
            checked_N = checked_rows(batch)
            tensors = {"lse_C": float32(rows.lse_N[checked_N]), "label_logp_C": float32(label_N[checked_N])}
        else:
            tensors = {"lse_N": float32(rows.lse_N), "label_logp_N": float32(label_N)}
        blocks = self.blocks.run(self.embedding_VD[batch.token_ids_T], batch)
        for signal in spec.signals:
            if signal.kind in FAKE_FEATURES:
                tensors |= FAKE_FEATURES[signal.kind](signal, blocks, self.basis)
            else:
                tensors |= FAKE_SIGNALS[signal.kind](signal, rows)
        return TeacherSignals(tensors)


@dataclass(frozen=True)
class FakeRows:
    """What signals are made of: float32, of the wanted rows of a batch.

    Attributes:
        packed: the compressed states, if these are asked for; `hidden_ND` is then what a student makes of them again.
    """

    batch: TokenBatch
    hidden_ND: np.ndarray
    logits_NV: np.ndarray
    lse_N: np.ndarray
    packed: dict[str, Tensor] | None = None


def _top_k(signal: TopK, rows: FakeRows) -> dict[str, Tensor]:
    """The kept entries and their tail: the named ids first of all, then the likeliest of the others."""
    logits_NV, extra_NM = rows.logits_NV, rows.batch.extra_ids_NM
    first_NV = -logits_NV.astype(np.float64)
    if extra_NM is not None:
        np.put_along_axis(first_NV, extra_NM.astype(np.int64), -np.inf, -1)
    kept_NK = np.argsort(first_NV, axis=-1, kind="stable")[:, : signal.kept]
    rest_NV = logits_NV.copy()
    np.put_along_axis(rest_NV, kept_NK, -np.inf, -1)
    kept_NK = np.sort(kept_NK, axis=-1)  # equal logits: rising id
    kept_logits_NK = np.take_along_axis(logits_NV, kept_NK, -1)
    order_NK = np.argsort(-kept_logits_NK, axis=-1, kind="stable")
    kept_NK, kept_logits_NK = (np.take_along_axis(array, order_NK, -1) for array in (kept_NK, kept_logits_NK))
    everything = signal.kept == logits_NV.shape[-1]
    tail_N = np.full(len(rows.lse_N), -np.inf) if everything else _lse(rest_NV) - rows.lse_N
    ids = token_id_dtype(logits_NV.shape[-1])
    return {
        "topk_ids_NK": Tensor(ids, kept_NK.astype(np.uint16 if ids == "uint16" else np.uint32)),
        "topk_logits_NK": float32(kept_logits_NK),
        "tail_logp_N": float32(tail_N),
    }


def _hidden(signal: Hidden, rows: FakeRows) -> dict[str, Tensor]:
    return {"hidden_ND": float32(rows.hidden_ND)} if rows.packed is None else rows.packed


def _full(signal: Full, rows: FakeRows) -> dict[str, Tensor]:
    return {"logits_NV": float32(rows.logits_NV)}


def _given(signal: Given, rows: FakeRows) -> dict[str, Tensor]:
    return {}


# How the fake makes each kind of signal.
FAKE_SIGNALS: dict[str, Callable[[Any, FakeRows], dict[str, Tensor]]] = {
    TopK.kind: _top_k,
    Hidden.kind: _hidden,
    Full.kind: _full,
    Given.kind: _given,
}


def _lse(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1))


def _spoil(signals: TeacherSignals, mistake: str) -> TeacherSignals:
    """`signals` with one fault that a student must notice."""
    arrays = {name: tensor.array.copy() for name, tensor in signals.tensors.items()}
    if mistake == "shifted":
        arrays = {name: np.roll(array, 1, axis=0) for name, array in arrays.items()}
    elif mistake == "truncated":
        arrays = {name: array[:-1] for name, array in arrays.items()}
    elif mistake == "nan":
        arrays["label_logp_N" if "label_logp_N" in arrays else "label_logp_C"][-1] = np.nan
    elif mistake == "unsorted" and "topk_ids_NK" in arrays:
        for name in ("topk_ids_NK", "topk_logits_NK"):
            arrays[name] = arrays[name][:, ::-1].copy()
    elif mistake == "duplicate" and "topk_ids_NK" in arrays:
        arrays["topk_ids_NK"][:, 1] = arrays["topk_ids_NK"][:, 0]
    elif mistake == "mass" and "tail_logp_N" in arrays:
        arrays["tail_logp_N"][:] = -0.01
    elif mistake == "state" and "hidden_ND" in arrays:
        arrays["hidden_ND"] *= 1.5  # as if it were taken before the final norm
    tensors = {name: Tensor(signals.tensors[name].dtype, array) for name, array in arrays.items()}
    fingerprint = "0" * 64 if mistake == "foreign" else signals.fingerprint
    return TeacherSignals(tensors, fingerprint, signals.timing)
