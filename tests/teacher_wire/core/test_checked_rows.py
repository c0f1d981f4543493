"""Which rows are checked: the same on both sides, for ever, whatever else is asked beside a sequence."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from teacher_wire.core.axes import Axis, Entries
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows

SEQUENCES = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=40), min_size=1, max_size=5)


def by_the_letter(ids, wanted):
    """The specification (v2/teacher.proto, Check), one row after the other in Python's own numbers."""
    seed = int.from_bytes(hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).digest()[:8], "little")

    def mixed(x):
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    rows = [t for t, flag in enumerate(wanted) if flag]
    return [t in (rows[0], rows[-1]) or mixed(seed ^ t) % 8 == 0 for t in rows]


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_they_are_those_of_the_specification(sequences, random):
    wanted = [[random.random() < 0.7 for _ in ids[:-1]] + [False] for ids in sequences]
    wanted[-1][0] = True
    batch = TokenBatch.pack(sequences, wanted)
    expected = [
        flag for ids, flags in zip(sequences, wanted, strict=True) if any(flags) for flag in by_the_letter(ids, flags)
    ]
    assert checked_rows(batch).tolist() == expected
    assert Entries(batch).total(Axis.CHECKED) == sum(expected)


def test_splitmix64_is_the_published_one():
    from teacher_wire.core.checked_rows import _splitmix64

    # First outputs of the reference implementation (Vigna, splitmix64.c) from the state 1234567.
    states = np.array([1234567, 1234567 + 0x9E3779B97F4A7C15], np.uint64)
    assert _splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973]


def test_one_row_in_eight_is_checked_beside_the_first_and_the_last():
    rng = np.random.default_rng(0)
    batch = TokenBatch.pack([rng.integers(0, 150_000, 2049).tolist() for _ in range(16)])
    share = checked_rows(batch).mean()
    assert 0.118 < share < 0.133


def test_company_and_order_change_nothing():
    rng = np.random.default_rng(1)
    batch = TokenBatch.pack([rng.integers(0, 300, n).tolist() for n in (5, 80, 2, 33)])
    each = np.split(checked_rows(batch), batch.row_bounds_B1[1:-1])
    for order in ([2, 0], [3], [1, 3, 0, 2]):
        expected = np.concatenate([each[b] for b in order])
        np.testing.assert_array_equal(checked_rows(batch.select(order)), expected)
