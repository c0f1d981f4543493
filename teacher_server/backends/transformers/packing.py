"""Which tokens per forward pass computes, and who attends to whom: a policy over ids, without torch.

In: sequences of token ids; out: segments packed one behind the other without padding. A prefix that several sequences
share is one segment, computed once: the segments behind it attend to it as to their own past.
Axes: B sequences, T computed tokens, S segments, S1 = S + 1, U keys of all segments, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Layout:
    """The tokens of one forward pass.

    Attributes:
        ids_T: int32, the tokens to compute.
        positions_T: int32, of each in its sequence.
        cu_queries_S1: int32, rising from 0 to T; segment s is [cu[s], cu[s+1]).
        cu_keys_S1: int32, the same for its keys: its past and itself. Query i of a segment sees all but the last
            (queries - 1 - i) of its keys.
        key_rows_U: int32, the computed token of each key; None if every segment has no past but itself.
        rows_of: for each sequence, the computed token of each of its tokens, int32 [L].
    """

    ids_T: np.ndarray
    positions_T: np.ndarray
    cu_queries_S1: np.ndarray
    cu_keys_S1: np.ndarray
    key_rows_U: np.ndarray | None
    rows_of: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """T, what the pass costs."""
        return int(self.ids_T.size)

    @property
    def max_queries(self) -> int:
        return int(np.diff(self.cu_queries_S1).max())

    @property
    def max_keys(self) -> int:
        return int(np.diff(self.cu_keys_S1).max())


def pack(sequences: Sequence[np.ndarray], prefix_min_tokens: int = 0) -> Layout:
    """Lays out whole sequences.

    Args:
        sequences: int32 ids of each.
        prefix_min_tokens: fewest tokens that two sequences must share, from the start or behind another shared part,
            for those to be computed once; 0 never shares.
    """
    segments = _shared(sequences, prefix_min_tokens) if prefix_min_tokens else _apart(sequences)
    lengths_S = np.array([segment.stop - segment.start for segment in segments])
    cu_queries_S1 = _cumulative(lengths_S)
    own = [np.arange(cu, cu + n, dtype=np.int32) for cu, n in zip(cu_queries_S1, lengths_S, strict=False)]
    paths = [np.concatenate([own[s] for s in (*segment.past, i)]) for i, segment in enumerate(segments)]
    rows_of: list[np.ndarray] = [np.empty(0, np.int32)] * len(sequences)
    for i, segment in enumerate(segments):
        for sequence in segment.ends:
            rows_of[sequence] = paths[i]
    ids_T = np.concatenate([sequences[s.sequence][s.start : s.stop] for s in segments])
    positions_T = np.concatenate([np.arange(s.start, s.stop, dtype=np.int32) for s in segments])
    shared = any(segment.past for segment in segments)
    return Layout(
        ids_T=ids_T.astype(np.int32, copy=False),
        positions_T=positions_T,
        cu_queries_S1=cu_queries_S1,
        cu_keys_S1=_cumulative(np.array([len(path) for path in paths])) if shared else cu_queries_S1,
        key_rows_U=np.concatenate(paths) if shared else None,
        rows_of=rows_of,
    )


@dataclass
class _Segment:
    """Tokens [start, stop) of a sequence, behind the segments `past`; whole sequences in `ends` end with it."""

    sequence: int
    start: int
    stop: int
    past: tuple[int, ...]
    ends: list[int]


def _apart(sequences: Sequence[np.ndarray]) -> list[_Segment]:
    return [_Segment(i, 0, len(ids), (), [i]) for i, ids in enumerate(sequences)]


def _shared(sequences: Sequence[np.ndarray], least: int) -> list[_Segment]:
    """The tree of prefixes: neighbours in sorted order share the most, so one walk over their common lengths is enough."""
    order = sorted(range(len(sequences)), key=lambda b: sequences[b].astype(">i4").tobytes())
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    segments: list[_Segment] = []
    todo: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(order), 0, ())]
    while todo:
        first, last, depth, past = todo.pop()  # sequences order[first:last] share their first `depth` tokens
        start = first
        while start < last:
            stop = start + 1
            while stop < last and common[stop - 1] >= depth + least:
                stop += 1
            group = order[start:stop]
            reach = min(common[start : stop - 1], default=len(sequences[group[0]]))
            if reach > depth:
                ends = [b for b in group if len(sequences[b]) == reach]
                segments.append(_Segment(group[0], depth, reach, past, ends))
                if len(ends) < len(group):
                    todo.append((start + len(ends), stop, reach, (*past, len(segments) - 1)))
            else:  # nothing but what is computed already
                segments[past[-1]].ends.append(group[0])
            start = stop
    return segments


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens two sequences share from their start."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    cu = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu[1:])
    return cu
