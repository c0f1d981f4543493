"""What the fake teacher writes: deterministic samples, texts of a test's own choosing, and named mistakes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import numpy as np

from teacher_wire.core.errors import OverloadedError, ServerError, UnavailableError
from teacher_wire.generate.messages import GenerateCall, Sample

WRITER_MISTAKES = ("", "repeated", "unasked", "missing", "too_long", "nan", "foreign_id", "crash")


@dataclass
class FakeWriter:
    """Answers Generate for the fake teacher.

    Attributes:
        write: (prompt ids, sample number) -> ids of the sample; by default some that only these two and the seed decide.
        delay_s: pause before each sample.
        mistake: one of WRITER_MISTAKES.
        break_after: samples after which a call breaks off as unavailable, once; 0 for never.
        refusals: calls refused as overloaded before the first is answered.
        salt: of the weights; fakes that differ in it write different texts.
        calls, written, open: calls begun, samples made, calls under way.
    """

    write: Callable[[list[int], int], list[int]] | None = None
    delay_s: float = 0.0
    mistake: str = ""
    break_after: int = 0
    refusals: int = 0
    salt: int = 0
    generates: tuple[str, ...] = ("tokens", "json_schema")
    limits: dict[str, int] = field(
        default_factory=lambda: {
            "max_new_tokens": 4096, "max_samples": 64, "max_generate_tokens": 1 << 20, "max_schema_bytes": 65_536
        }
    )  # fmt: skip
    calls: int = field(default=0, init=False)
    written: int = field(default=0, init=False)
    open: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.mistake not in WRITER_MISTAKES:
            raise ValueError(f"mistake must be one of {'|'.join(WRITER_MISTAKES)}, not {self.mistake!r}")

    async def samples(self, call: GenerateCall, vocab_rows: int) -> AsyncGenerator[Sample, None]:
        """The samples of a call, in order."""
        self.calls += 1
        if self.refusals:
            self.refusals -= 1
            raise OverloadedError("the fake was told to refuse", retry_after_s=0.01)
        self.open += 1
        try:
            for number, (prompt, index) in enumerate(call.wanted()):
                await asyncio.sleep(self.delay_s)
                if self.break_after and number == self.break_after:
                    self.break_after = 0
                    raise UnavailableError("the fake was told to break off")
                if self.mistake == "missing" and number == call.samples - 1:
                    break
                self.written += 1
                sample = self._sample(call, prompt, index, vocab_rows)
                for spoiled in self._spoil(sample, vocab_rows):
                    yield spoiled
        finally:
            self.open -= 1

    def _sample(self, call: GenerateCall, prompt: int, index: int, vocab_rows: int) -> Sample:
        ids = call.prompts.prompt(prompt).tolist()
        if self.write is not None:
            written = self.write(ids, index)
        else:
            named = (ids, call.spec.seed, index, *([self.salt] if self.salt else []))
            digest = hashlib.sha256(repr(named).encode()).digest()
            written = [byte % vocab_rows for byte in digest[: 1 + digest[0] % 8]]
        cut = written[: call.spec.max_new_tokens]
        logp_n = -np.linspace(0.01, 1.0, len(cut), dtype=np.float32)
        return Sample(prompt, index, np.array(cut, np.int32), logp_n, "stop" if cut == written else "length")

    def _spoil(self, sample: Sample, vocab_rows: int) -> list[Sample]:
        """`sample` with the mistake in it."""
        if self.mistake == "crash":
            raise ServerError("the fake was told to crash")
        if self.mistake == "repeated":
            return [sample, sample]
        if self.mistake == "unasked":
            return [replace(sample, prompt=sample.prompt + 1000)]
        if self.mistake == "too_long":
            return [replace(sample, token_ids_n=np.ones(9999, np.int32), token_logp_n=np.zeros(9999, np.float32))]
        if self.mistake == "nan":
            return [replace(sample, token_logp_n=sample.token_logp_n * np.float32("nan"))]
        if self.mistake == "foreign_id":
            return [replace(sample, token_ids_n=sample.token_ids_n + np.int32(vocab_rows))]
        return [sample]
