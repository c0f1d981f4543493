"""Models behind one protocol (`base.Backend`); `config.backends.BACKENDS` is the registry of their kinds."""

from __future__ import annotations

from importlib import import_module

from teacher_server.backends.base import Backend, ModelFacts
from teacher_server.config.backends import BackendConfig


def build_backend(config: BackendConfig, *, deterministic: bool) -> Backend:
    """Loads the model that `config` describes; only now is torch imported, and only for kinds that need it."""
    backend: Backend = import_module(config.built_by).load(config, deterministic=deterministic)
    return backend


__all__ = ["Backend", "ModelFacts", "build_backend"]
