"""What travels when a teacher is asked to write: prompts and a way of sampling up, samples down.

Axes: B prompts, T packed tokens, S samples of a prompt, n tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError, RequestError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate.schemas import check_schema

Finish = Literal["stop", "length"]
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0
MAX_STOP_IDS = 64


@dataclass(frozen=True)
class SamplingSpec:
    """How samples are drawn (proto: SamplingSpec).

    Attributes:
        samples: S, of each prompt.
        temperature: 0 for the likeliest token every time.
        top_p: share of the probability that is drawn from, likeliest tokens first.
        max_new_tokens: of one sample.
        seed: of all samples; each has its own stream.
        stop_ids: ids that end a sample, beside the teacher's own ends of text.
        ignore_eos: the teacher's own ends of text end nothing.
        json_schema: JSON text, or "" for free text.

    Raises:
        RequestError: a value outside its range.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    json_schema: str = ""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise RequestError("at least one", field=name, value=getattr(self, name), limit=">= 1")
        hot = MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE  # false for NaN
        if not (hot or self.temperature == 0):
            limit = f"0 or {MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}"
            raise RequestError("temperature out of range", field="temperature", value=self.temperature, limit=limit)
        if not 0 < self.top_p <= 1:
            raise RequestError("top_p out of range", field="top_p", value=self.top_p, limit="above 0, at most 1")
        if not 0 <= self.seed < 1 << 64:
            raise RequestError("seed out of range", field="seed", value=self.seed, limit="0..2^64-1")
        if len(self.stop_ids) > MAX_STOP_IDS or any(token < 0 for token in self.stop_ids):
            limit = f"at most {MAX_STOP_IDS} ids, none negative"
            raise RequestError("stop ids", field="stop_ids", value=len(self.stop_ids), limit=limit)


@dataclass(frozen=True)
class PromptBatch:
    """B prompts packed into T tokens: prompt b is token_ids_T[cu_lengths_B1[b] : cu_lengths_B1[b + 1]], never empty.

    Raises:
        RequestError: the two do not fit together.
    """

    token_ids_T: np.ndarray
    cu_lengths_B1: np.ndarray

    def __post_init__(self) -> None:
        ids, cu = self.token_ids_T, self.cu_lengths_B1
        for name, array in (("token_ids", ids), ("cu_lengths", cu)):
            if array.ndim != 1 or array.dtype != np.int32:
                shown = f"{array.dtype}{list(array.shape)}"
                raise RequestError("wrong type", field=name, value=shown, limit="int32[n]")
        if cu.size < 2 or cu[0] != 0 or cu[-1] != ids.size or np.any(np.diff(cu.astype(np.int64)) < 1):
            raise RequestError(
                "cu_lengths must rise from 0 to the number of tokens", field="cu_lengths", limit=f"0..{ids.size}"
            )
        if ids.min() < 0:
            raise RequestError("negative token id", field="token_ids", value=int(ids.min()), limit=">= 0")

    @classmethod
    def pack(cls, prompts: Sequence[Sequence[int]]) -> PromptBatch:
        """Packs prompts of ids."""
        cu_B1 = np.zeros(len(prompts) + 1, np.int32)
        cu_B1[1:] = np.cumsum([len(prompt) for prompt in prompts], dtype=np.int32)
        return cls(np.fromiter((i for prompt in prompts for i in prompt), np.int32, int(cu_B1[-1])), cu_B1)

    @property
    def prompts(self) -> int:
        return int(self.cu_lengths_B1.size - 1)

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.cu_lengths_B1)

    def prompt(self, number: int) -> np.ndarray:
        """int32 ids of one prompt."""
        return self.token_ids_T[self.cu_lengths_B1[number] : self.cu_lengths_B1[number + 1]]


@dataclass(frozen=True)
class Sample:
    """One finished sample.

    Attributes:
        prompt, index: which; sample `index` of prompt `prompt`.
        token_ids_n: int32, the stop id included.
        token_logp_n: float32, of each token at temperature 1, before top_p and schema.
        finish: `length` if it was cut off.
    """

    prompt: int
    index: int
    token_ids_n: np.ndarray
    token_logp_n: np.ndarray
    finish: Finish

    @property
    def logp(self) -> float:
        """Log-probability of the whole sample."""
        return float(self.token_logp_n.sum(dtype=np.float64))


@dataclass(frozen=True)
class GenerateCall:
    """One call as the server sees it.

    Attributes:
        have: (prompt, sample) that the student has already.
        timeout_s: seconds the student waits; 0 for no limit.
        tenant: who asks.

    Raises:
        RequestError: `have` names what was not asked for, or everything.
    """

    teacher: str
    fingerprint: str
    spec: SamplingSpec
    prompts: PromptBatch
    have: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    timeout_s: float = 0.0
    tenant: str = ""

    def __post_init__(self) -> None:
        for prompt, sample in self.have:
            if not (0 <= prompt < self.prompts.prompts and 0 <= sample < self.spec.samples):
                limit = f"{self.prompts.prompts} prompts, {self.spec.samples} samples"
                raise RequestError("no such sample", field="have", value=(prompt, sample), limit=limit)
        if self.samples < 1:
            raise RequestError("nothing is left to make", field="have", value=len(self.have))

    @property
    def samples(self) -> int:
        """How many are to be made."""
        return self.prompts.prompts * self.spec.samples - len(self.have)

    @cached_property
    def tokens(self) -> int:
        """Prompt and new tokens of all samples to be made, at most. Walks `have`, once."""
        whole = int(self.prompts.lengths_B.sum()) * self.spec.samples
        held = sum(int(self.prompts.lengths_B[prompt]) for prompt, _ in self.have)
        return whole - held + self.samples * self.spec.max_new_tokens

    def wanted(self) -> Iterator[tuple[int, int]]:
        """(prompt, sample) to be made, in order; only of a call that has passed `check_generate`."""
        every = ((prompt, sample) for prompt in range(self.prompts.prompts) for sample in range(self.spec.samples))
        return (pair for pair in every if pair not in self.have)


def check_generate(call: GenerateCall, info: TeacherInfo) -> None:
    """Refuses a call that this teacher cannot answer, before any work is done for it.

    Raises:
        CapabilityError: the teacher does not write, or holds to no schema.
        MismatchError: another teacher was meant.
        RequestError, LimitError: naming field, value and limit.
    """
    spec, limits = call.spec, info.limits
    if call.fingerprint and call.fingerprint != info.fingerprint:
        raise MismatchError(
            f"teacher {info.name!r} has other weights than the request expects",
            field="fingerprint", value=info.fingerprint, limit=call.fingerprint,
        )  # fmt: skip
    for needed in ("tokens", *(["json_schema"] if spec.json_schema else [])):
        if needed not in info.generates:
            raise CapabilityError(
                f"teacher {info.name!r} does not generate this way",
                field="generates", value=needed, limit="|".join(info.generates) or "nothing",
            )  # fmt: skip
    longest = int(np.argmax(call.prompts.lengths_B))
    for name, value, limit in (
        ("samples", spec.samples, limits.max_samples),
        ("max_new_tokens", spec.max_new_tokens, limits.max_new_tokens),
        ("prompts", call.prompts.prompts, limits.max_request_sequences),
        (f"prompt {longest} and max_new_tokens", int(call.prompts.lengths_B[longest]) + spec.max_new_tokens,
         limits.max_sequence_tokens),
        ("prompt and new tokens of all samples", call.tokens, limits.max_generate_tokens),
    ):  # fmt: skip
        if value > limit:
            raise LimitError(f"above the limit of teacher {info.name!r}", field=name, value=value, limit=limit)
    for name, ids in (("token_ids", call.prompts.token_ids_T), ("stop_ids", np.array(spec.stop_ids or (0,)))):
        if ids.max() >= info.vocab_rows:
            raise RequestError(
                "token id outside the teacher's vocabulary",
                field=name, value=int(ids.max()), limit=info.vocab_rows - 1,
            )  # fmt: skip
    if spec.json_schema:
        check_schema(spec.json_schema, limits.max_schema_bytes)
