"""The policy alone: replicas for the tokens that wait, within bounds."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle

from teacher_server.replica.autoscaling import QUEUED_TOKENS, WINDOW_S, QueuedTokensPolicy


def context(*replicas, least=1, most=10, now=100.0):
    """Every replica is a list of (age in seconds, queued tokens)."""
    series = {
        f"r{place}": [SimpleNamespace(timestamp=now - age, value=tokens) for age, tokens in points]
        for place, points in enumerate(replicas)
    }
    return SimpleNamespace(
        raw_metrics={QUEUED_TOKENS: series} if replicas else {},
        current_time=now,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )


@pytest.mark.parametrize(
    ("replicas", "wanted"),
    [
        ([], 1),
        ([[(0, 0)]], 1),
        ([[(0, 1000)]], 1),
        ([[(0, 1001)]], 2),
        ([[(0, 1500)], [(0, 1500)]], 3),
        ([[(0, 99_000)]], 10),
        ([[]], 1),
        ([[(1, 1000), (2, 3000)]], 2),
        ([[(1, 1000), (WINDOW_S + 1, 9000)]], 1),
        ([[(WINDOW_S + 9, 3000)]], 3),
    ],
)
def test_one_replica_for_every_target_of_waiting_tokens(replicas, wanted):
    assert QueuedTokensPolicy(1000)(context(*replicas)) == (wanted, {})


@given(st.lists(st.integers(0, 10**9), max_size=5), st.integers(1, 10**6), st.integers(1, 5), st.integers(0, 5))
def test_it_never_leaves_its_bounds(queues, target, least, more):
    found, _ = QueuedTokensPolicy(target)(context(*([(0, q)] for q in queues), least=least, most=least + more))
    assert least <= found <= least + more
    assert found in (least, least + more) or (found - 1) * target < sum(queues) <= found * target


def test_it_travels_by_value_alone():
    """As Serve ships it: the controller may run where our package is not."""
    import subprocess
    import sys

    from teacher_server.replica import autoscaling

    cloudpickle.register_pickle_by_value(autoscaling)
    try:
        shipped = cloudpickle.dumps(QueuedTokensPolicy)
    finally:
        cloudpickle.unregister_pickle_by_value(autoscaling)
    code = (
        "import sys\nfrom ray import cloudpickle\n"
        "policy = cloudpickle.loads(sys.stdin.buffer.read())(target_queued_tokens=5)\n"
        "assert not [name for name in sys.modules if name.startswith('teacher_')]\n"
        "print(policy)"
    )
    result = subprocess.run([sys.executable, "-c", code], input=shipped, capture_output=True, cwd="/")
    assert result.returncode == 0, result.stderr
