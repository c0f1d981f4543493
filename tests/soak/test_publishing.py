"""Issue 16, line 7 at length: ten revisions in a run under load of another tenant."""

from __future__ import annotations

import os

import pytest

from tests.e2e.published_run import published_run

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("LYCEUM_SOAK"), reason="takes minutes: run make soak"),
]


async def test_ten_revisions_under_load(model_factory, rows_file, tmp_path, monkeypatch, capsys):
    told = await published_run(tmp_path, model_factory("qwen2", seed=5), rows_file, 10, monkeypatch, broken_first=True)
    with capsys.disabled():
        print("\n" + "\n".join(f"{name}: {value}" for name, value in told.items() if name != "server"))
    assert len(told["answers"]) == 11
