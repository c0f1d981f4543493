"""The fake of the wire as a backend, so that the whole server runs without a model."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from teacher_server.backends.base import ModelFacts
from teacher_server.config import FakeBackend, GenerationConfig
from teacher_server.generation import OnThread
from teacher_wire.fake import FakeTeacher
from teacher_wire.fake_generation import FakeWriter
from teacher_wire.generation import GenerateCall, Sample
from teacher_wire.messages import HeadHeader, SignalSpec, TeacherHead, TeacherSignals, TokenBatch, float32


class FakeModel:
    """See `teacher_wire.fake.FakeTeacher`."""

    def __init__(self, config: FakeBackend) -> None:
        self._delay_s = config.delay_s
        writer = FakeWriter(delay_s=config.delay_s, generates=("tokens",))  # it holds to no schema
        self._teacher = FakeTeacher(
            vocab_rows=config.vocab_rows, hidden_size=config.hidden_size, seed=config.seed, writer=writer
        )
        info = self._teacher.teacher_info()
        kept = {name: getattr(info, name) for name in ModelFacts.__dataclass_fields__ if name != "max_sequence_tokens"}
        self._facts = ModelFacts(**kept, max_sequence_tokens=info.limits.max_sequence_tokens)

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def score(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> list[TeacherSignals]:
        time.sleep(self._delay_s)
        return [self._teacher.signals(spec, batch) for batch, spec in jobs]

    def head(self) -> TeacherHead:
        weight = float32(self._teacher.weight_VD)
        rows, columns = weight.shape
        return TeacherHead(HeadHeader("float32", rows, columns, None, 1.0, 0.0, self._facts.head_sha256), weight)

    def generation(self, config: GenerationConfig, on_thread: OnThread, *, deterministic: bool) -> FakeGeneration:
        return FakeGeneration(self._teacher)


class FakeGeneration:
    """A `Generation` without a queue: every call is answered as it comes."""

    def __init__(self, teacher: FakeTeacher) -> None:
        self._teacher = teacher

    def start(self) -> None:
        """Nothing to begin."""

    def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        return self._teacher.writer.samples(call, self._teacher.vocab_rows)

    def stop(self) -> None:
        """Nothing to end."""

    def check_health(self) -> None:
        """Always well."""

    def counters(self) -> dict[str, int]:
        return {}
