"""The layout of a pass: every token of every sequence is there, sees exactly its own past, and shared ones are there once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.backends.transformers.packing import Layout, pack

few_ids = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=9), min_size=1, max_size=8)


def arrays(sequences):
    return [np.array(ids, np.int32) for ids in sequences]


def check(layout: Layout, sequences):
    for rows, ids in zip(layout.rows_of, sequences, strict=True):
        np.testing.assert_array_equal(layout.ids_T[rows], ids)
        np.testing.assert_array_equal(layout.positions_T[rows], np.arange(len(ids)))
    keys_U = layout.key_rows_U if layout.key_rows_U is not None else np.arange(layout.tokens)
    segments = len(layout.cu_queries_S1) - 1
    paths = {tuple(rows[: i + 1]) for rows in layout.rows_of for i in range(len(rows))}
    for s in range(segments):
        queries = np.arange(layout.cu_queries_S1[s], layout.cu_queries_S1[s + 1])
        keys = keys_U[layout.cu_keys_S1[s] : layout.cu_keys_S1[s + 1]]
        for i in range(len(queries)):  # what query i sees is the past of its token in some sequence
            seen = keys[: len(keys) - (len(queries) - 1 - i)]
            assert seen[-1] == queries[i]
            assert tuple(seen) in paths


@settings(deadline=None)
@given(few_ids, st.integers(0, 3))
def test_every_token_sees_its_own_past(sequences, least):
    sequences = arrays(sequences)
    layout = pack(sequences, least)
    check(layout, sequences)
    if least == 0:
        assert layout.tokens == sum(map(len, sequences)) and layout.key_rows_U is None
    if least == 1:  # a prefix tree: as many tokens as there are distinct prefixes
        assert layout.tokens == len({tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))})


@pytest.mark.parametrize(("least", "tokens"), [(0, 36), (4, 36 - 2 * 6 - 4), (6, 36 - 2 * 6), (7, 26), (11, 36)])
def test_a_prefix_is_shared_from_so_many_tokens_on(least, tokens):
    """Three sequences of 12 share 6 tokens, two of them 4 more."""
    prompt = [1, 2, 3, 4, 5, 6]
    sequences = arrays([[*prompt, 7, 7, 7, 7, 0, 0], [*prompt, 7, 7, 7, 7, 1, 1], [*prompt, 8, 8, 8, 8, 8, 8]])
    layout = pack(sequences, least)
    check(layout, sequences)
    assert layout.tokens == tokens


def test_a_sequence_twice_is_computed_once():
    sequences = arrays([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6]])
    layout = pack(sequences, 2)
    check(layout, sequences)
    assert layout.tokens == 4
