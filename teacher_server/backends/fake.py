"""The fake of the wire as a backend, so that the whole server runs without a model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any

from teacher_server.backends.base import ModelFacts
from teacher_server.config.backends import FakeBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.config.server import GenerationConfig
from teacher_server.decoding.scheduler import WRITING_COUNTERS, OnThread
from teacher_server.errors import ServerConfigError
from teacher_wire.artifacts.messages import Artifact, ArtifactCall
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import TeacherWireError, UnavailableError
from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.testing.fake_generation import FakeWriter
from teacher_wire.testing.fake_teacher import FakeTeacher


class FakeModel:
    """See `teacher_wire.testing.fake_teacher.FakeTeacher`."""

    def __init__(self, config: FakeBackend) -> None:
        self._delay_s = config.delay_s
        self._tokens_per_s = config.tokens_per_s or float("inf")
        self._breaks_after = config.breaks_after
        self._forwards = 0
        writer = FakeWriter(delay_s=config.delay_s, generates=("tokens",), salt=config.seed)  # it holds to no schema
        self._teacher = FakeTeacher(
            vocab_rows=config.vocab_rows,
            hidden_size=config.hidden_size,
            seed=config.seed,
            layers=config.layers,
            writer=writer,
        )
        self._describe()

    def _describe(self) -> None:
        info = self._teacher.teacher_info()
        kept = {name: getattr(info, name) for name in ModelFacts.__dataclass_fields__ if name != "max_sequence_tokens"}
        self._facts = ModelFacts(**kept, max_sequence_tokens=info.limits.max_sequence_tokens)

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def score(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> list[TeacherSignals]:
        self._forwards += 1
        if self._breaks_after and self._forwards > self._breaks_after:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (the fake was told to break)")
        done_s = time.monotonic() + self._delay_s + sum(batch.tokens for batch, _ in jobs) / self._tokens_per_s
        answers = [self._teacher.signals(spec, batch) for batch, spec in jobs]
        time.sleep(max(0.0, done_s - time.monotonic()))
        return answers

    def begin(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> Callable[[], list[TeacherSignals]]:
        answers = self.score(jobs)
        return lambda: answers

    def artifact(self, wanted: ArtifactInfo) -> Artifact:
        return self._teacher.artifact(ArtifactCall("", "", wanted.kind, wanted.sha256))

    def calibrate(self, features: FeaturesConfig) -> None:
        if features.calibration is not None or features.chosen(self._teacher.layers) != tuple(
            range(self._teacher.layers + 1)
        ):
            raise ServerConfigError("features: the fake has a basis of no text, and of all its layers")
        self._teacher = replace(self._teacher, basis_rank=min(features.rank, self._teacher.hidden_size))
        self._describe()

    def generation(self, config: GenerationConfig, on_thread: OnThread, *, deterministic: bool) -> FakeGeneration:
        return FakeGeneration(self._teacher)


def load(config: FakeBackend, *, deterministic: bool) -> FakeModel:
    """The fake; it always gives the same bits."""
    del deterministic
    return FakeModel(config)


class FakeGeneration:
    """A `Generation` without a queue: every call is answered as it comes."""

    def __init__(self, teacher: FakeTeacher) -> None:
        self._teacher = teacher
        self._done: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._lost: TeacherWireError | None = None

    def start(self) -> None:
        """Nothing to begin."""

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        self._done["generate_calls"] += 1
        samples = self._teacher.writer.samples(call, self._teacher.vocab_rows)
        try:
            async for sample in samples:
                if self._lost is not None:
                    raise self._lost
                self._done["generated_samples"] += 1
                self._done["generated_tokens"] += len(sample.token_ids_n)
                prompt_tokens = int(call.prompts.lengths_B[sample.prompt])
                self._served[call.tenant] += prompt_tokens + len(sample.token_ids_n)
                yield sample
        finally:
            self._done["generate_calls"] -= 1
            await samples.aclose()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Nobody waits: there is nothing to share."""

    def fail(self, error: TeacherWireError) -> None:
        self._lost = error

    def stop(self) -> None:
        self.fail(UnavailableError("the teacher is going away"))

    def check_health(self) -> None:
        """Always well."""

    def counters(self) -> dict[str, Any]:
        tenants = {name: {"served_tokens": tokens} for name, tokens in self._served.items()}
        return {**{name: self._done[name] for name in WRITING_COUNTERS}, "tenants": tenants}
