"""Models behind one protocol (`base.Backend`); the visible dict of kinds is the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from teacher_server.backends.base import Backend, ModelFacts
from teacher_server.config.backends import FakeBackend, TransformersBackend, VllmBackend


def _transformers(config: Any, deterministic: bool) -> Backend:
    from teacher_server.backends.transformers.backend import load

    return load(config, deterministic=deterministic)


def _vllm(config: Any, deterministic: bool) -> Backend:
    from teacher_server.backends.vllm.backend import load

    return load(config, deterministic=deterministic)


def _fake(config: Any, deterministic: bool) -> Backend:
    from teacher_server.backends.fake import FakeModel

    return FakeModel(config)


BACKENDS: dict[str, Callable[[Any, bool], Backend]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "fake": _fake,
}


def build_backend(config: TransformersBackend | VllmBackend | FakeBackend, *, deterministic: bool) -> Backend:
    """Loads the model that `config` describes; only now is torch imported, and only for kinds that need it."""
    return BACKENDS[config.kind](config, deterministic)


__all__ = ["BACKENDS", "Backend", "ModelFacts", "build_backend"]
