"""A student that becomes the teacher of its own server while it trains, and another tenant that notices nothing but new weights."""

import pytest

from tests.e2e.published_run import published_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


async def test_two_revisions_under_load(model_factory, rows_file, tmp_path, monkeypatch):
    told = await published_run(tmp_path, model_factory("qwen2", seed=5), rows_file, 2, monkeypatch)
    assert len(told["answers"]) == 3, "the first weights, and both revisions"
