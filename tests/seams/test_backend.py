"""A backend of one's own behind the real engine: settings and model in one file, and one line in `config.backends.BACKENDS`."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from teacher_server.backends.base import ModelFacts
from teacher_server.config import files, server
from teacher_server.config.backends import BACKENDS, BackendConfig
from teacher_server.errors import ServerConfigError
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CapabilityError, RequestError
from teacher_wire.testing.fake_teacher import FakeTeacher
from tests.teacher_server.replica.test_engine import call

# ---------------------------------------------------------------- the plug-in


class MeanConfig(BackendConfig):
    built_by: ClassVar[str] = __name__
    kind: Literal["mean"] = "mean"
    width: int = 8


class MeanTeacher(FakeTeacher):
    """A token's state is the mean of the embeddings so far."""

    def states(self, batch: TokenBatch) -> np.ndarray:
        embedded_TD = self.embedding_VD[batch.token_ids_T]
        parts = [
            embedded_TD[start:stop].cumsum(0) / np.arange(1, 1 + stop - start)[:, None]
            for start, stop in pairwise(batch.cu_lengths_B1)
        ]
        return np.concatenate(parts).astype(np.float32)


class MeanModel:
    def __init__(self, config: MeanConfig) -> None:
        self.teacher = MeanTeacher(vocab_rows=64, hidden_size=config.width, seed=5)
        info = self.teacher.teacher_info()
        same = {name: getattr(info, name) for name in ModelFacts.__dataclass_fields__ if name != "max_sequence_tokens"}
        self.facts = ModelFacts(**same | {"architecture": "Mean", "generates": ()}, max_sequence_tokens=16)

    def score(self, jobs: list[Any]) -> list[Any]:
        return [self.teacher.signals(spec, batch) for batch, spec in jobs]

    def begin(self, jobs: list[Any]) -> Any:
        answers = self.score(jobs)
        return lambda: answers

    def head(self) -> Any:
        raise CapabilityError("gives no head away")


def load(config: MeanConfig, *, deterministic: bool) -> MeanModel:
    return MeanModel(config)


# ---------------------------------------------------------------- the proof


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The server's config as a process parses it whose registry has the line."""
    monkeypatch.setitem(BACKENDS, "mean", MeanConfig)
    spec = importlib.util.spec_from_file_location("server_with_mean", str(server.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "server_with_mean", module)
    spec.loader.exec_module(module)
    return module


async def test_its_labels_come_through_the_engine(registered):
    config = registered.TeacherConfig.model_validate({"name": "t", "backend": {"kind": "mean", "width": 24}})
    config = registered.TeacherConfig.model_validate_json(config.model_dump_json())  # as it travels to a replica
    engine = TeacherEngine(config)
    engine.start()
    try:
        assert engine.info.architecture == "Mean" and engine.info.limits.max_sequence_tokens == 16
        answers = await asyncio.gather(*(engine.score(call(first)) for first in (3, 9)))
        with pytest.raises(RequestError):
            await engine.score(call(1, length=17))
    finally:
        await engine.stop()
    teacher = MeanTeacher(vocab_rows=64, hidden_size=24, seed=5)
    for first, answer in zip((3, 9), answers, strict=True):
        logits_V = teacher.embedding_VD[first] @ teacher.weight_VD.T  # of equal tokens the mean is one of them
        assert np.allclose(answer.lse_N.array, np.log(np.exp(logits_V).sum()), atol=1e-5) and answer.rows == 3
        assert answer.fingerprint == engine.info.fingerprint


def test_its_settings_are_as_strict_as_all_others(registered):
    parse = functools.partial(files.parse_as, registered.TeacherConfig, origin="server.yaml")
    with pytest.raises(ServerConfigError, match=r"backend\.widht: unknown key; did you mean width\?"):
        parse({"name": "t", "backend": {"kind": "mean", "widht": 24}})
    with pytest.raises(ServerConfigError, match="'fake', 'mean'"):
        parse({"name": "t", "backend": {"kind": "median"}})


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_kind_names_itself_and_a_module_that_is_there(kind):
    """Found without being imported: vLLM need not be installed."""
    config = BACKENDS[kind]
    spec = importlib.util.find_spec(config.built_by)
    assert config.model_fields["kind"].default == kind
    assert spec is not None and "def load(config: " in Path(str(spec.origin)).read_text()
