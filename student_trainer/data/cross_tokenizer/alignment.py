"""Which tokens of a text in one tokenizer stand for the same bytes as which in another (docs/concepts/method.md 8.3).

In: the ids of one completion in both, with their byte tables; out: groups, which end at the same byte on both sides and at none before.
Offsets are bytes and never characters: several tokens inside one character of many bytes would share a span of characters.

Axes: n tokens of the completion as the student writes it, m as the teacher does; N and M those of them that are supervised; G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from student_trainer.errors import DataError
from teacher_wire.vocabulary.byte_table import END, TEXT, THINK_CLOSE, THINK_OPEN, ByteTable

MATCHED_ROLES = (END, THINK_OPEN, THINK_CLOSE)  # of control tokens that mean the same in every tokenizer


@dataclass(frozen=True, eq=False)
class Alignment:
    """Groups of one sequence, in the order of the text. Rows in no group are of no use to the other side.

    Attributes:
        student_G2: int32, half-open ranges among the supervised rows of the student's sequence.
        teacher_G2: int32, likewise of the teacher's.
        is_control_G: bool, groups of two control tokens that have the same role, such as the ends of turn; 1-1 always.
    """

    student_G2: np.ndarray
    teacher_G2: np.ndarray
    is_control_G: np.ndarray

    @property
    def groups(self) -> int:
        return len(self.student_G2)

    @property
    def sizes_G2(self) -> np.ndarray:
        """int32, tokens of each group: the student's, the teacher's."""
        return np.stack(
            [self.student_G2[:, 1] - self.student_G2[:, 0], self.teacher_G2[:, 1] - self.teacher_G2[:, 0]], axis=1
        )

    @property
    def is_one_to_one_G(self) -> np.ndarray:
        """bool, groups of one token on both sides."""
        return np.asarray((self.sizes_G2 == 1).all(axis=1))

    def one_to_one_share(self, student_rows: int) -> float:
        """The share of the student's supervised rows that are in groups of one token on both sides; 0 without rows."""
        return float(self.is_one_to_one_G.sum()) / student_rows if student_rows else 0.0


@dataclass(frozen=True, eq=False)
class _Side:
    """A completion in the tokens of one tokenizer, one entry per token.

    Attributes:
        bytes_B: uint8, what all of them stand for.
        end_n: int64, where each ends in `bytes_B`.
        has_bytes_n: bool.
        role_n: uint8.
        wanted_n: bool, the supervised ones.
    """

    bytes_B: np.ndarray
    end_n: np.ndarray
    has_bytes_n: np.ndarray
    role_n: np.ndarray
    wanted_n: np.ndarray


def align(
    student_ids_n: np.ndarray,
    student_table: ByteTable,
    teacher_ids_m: np.ndarray,
    teacher_table: ByteTable,
    *,
    student_ends_n: np.ndarray | None = None,
    teacher_ends_m: np.ndarray | None = None,
    student_wanted_n: np.ndarray | None = None,
    teacher_wanted_m: np.ndarray | None = None,
) -> Alignment:
    """The groups of one completion.

    Text is grouped as far as both sides have the same bytes; behind the first byte that differs nothing is. Control tokens at the same
    byte are a group if they have the same role (`MATCHED_ROLES`). A group that would have another control token inside is left out, and
    so is one that has a token that is not supervised: a row is in at most one group, and what a group sums up is wanted on both sides.

    Args:
        student_ids_n: int, the completion's ids with its end of turn, without the prompt.
        student_table: the bytes of the student's ids.
        teacher_ids_m: int, the same completion as the teacher's tokenizer writes it.
        teacher_table: the bytes of the teacher's ids.
        student_ends_n: int, where each token ends in the completion's bytes; None: as the table says. Needed where a token's bytes are
            not all of the text, as with the space that SentencePiece puts before it: a token then stands for its last bytes.
        teacher_ends_m: likewise.
        student_wanted_n: bool, the supervised tokens; None for all.
        teacher_wanted_m: likewise.

    Returns:
        groups whose ranges count supervised tokens alone.

    Raises:
        DataError: an id beyond its table, or ends that do not fit the bytes of their tokens; names the side.
    """
    student = _side("student", student_ids_n, student_table, student_ends_n, student_wanted_n)
    teacher = _side("teacher", teacher_ids_m, teacher_table, teacher_ends_m, teacher_wanted_m)
    agreed = _agreed(student.bytes_B, teacher.bytes_B)
    texts_G4 = _text_groups(student, teacher, agreed)
    controls_G4 = _control_groups(student, teacher, agreed)
    groups_G4 = np.concatenate([texts_G4, controls_G4])
    is_control_G = np.arange(len(groups_G4)) >= len(texts_G4)
    kept_G = _all_of(student.wanted_n, groups_G4[:, :2]) & _all_of(teacher.wanted_n, groups_G4[:, 2:])
    order_G = np.argsort(groups_G4[:, 0], kind="stable")
    order_G = order_G[kept_G[order_G]]
    return Alignment(
        _ranks(student.wanted_n, groups_G4[order_G, :2]),
        _ranks(teacher.wanted_n, groups_G4[order_G, 2:]),
        is_control_G[order_G],
    )


def _side(name: str, ids: np.ndarray, table: ByteTable, ends: np.ndarray | None, wanted: np.ndarray | None) -> _Side:
    ids_n = np.asarray(ids, np.int64)
    if ids_n.size and not 0 <= int(ids_n.min()) <= int(ids_n.max()) < len(table):
        wrong = ids_n[(ids_n < 0) | (ids_n >= len(table))][0]
        raise DataError(f"is not among the {len(table)} of its byte table", field=f"{name} token id", value=int(wrong))
    whole_n = table.ends_V1[ids_n + 1] - table.ends_V1[ids_n]
    length_n = whole_n
    if ends is not None:
        length_n = np.diff(np.asarray(ends, np.int64), prepend=0)
        if length_n.shape != ids_n.shape:
            raise DataError(f"must be one per token, {len(ids_n)}", field=f"{name} byte ends", value=len(length_n))
        misfit = np.flatnonzero((length_n < 0) | (length_n > whole_n))
        if misfit.size:
            at = int(misfit[0])
            raise DataError(
                f"token {at} would have {int(length_n[at])} bytes, its table says {int(whole_n[at])}",
                field=f"{name} byte ends",
            )
    wanted_n = np.ones(len(ids_n), np.bool_) if wanted is None else np.asarray(wanted, np.bool_)
    if wanted_n.shape != ids_n.shape:
        raise DataError(f"must be one per token, {len(ids_n)}", field=f"{name} flags", value=len(wanted_n))
    end_n = np.cumsum(length_n)
    return _Side(
        _last_bytes(table, ids_n, length_n, end_n), end_n, length_n > 0, np.asarray(table.role_V)[ids_n], wanted_n
    )


def _last_bytes(table: ByteTable, ids_n: np.ndarray, length_n: np.ndarray, end_n: np.ndarray) -> np.ndarray:
    """uint8, the last `length_n` bytes of every token, one behind another."""
    shift_n = table.ends_V1[ids_n + 1] - end_n  # from a place in the text to the same byte in the table
    total = int(end_n[-1]) if end_n.size else 0
    return np.asarray(table.bytes_B)[np.arange(total) + np.repeat(shift_n, length_n)]


def _agreed(student_B: np.ndarray, teacher_B: np.ndarray) -> int:
    """How many bytes both texts begin with."""
    length = min(len(student_B), len(teacher_B))
    differs = np.flatnonzero(student_B[:length] != teacher_B[:length])
    return int(differs[0]) if differs.size else length


def _text_groups(student: _Side, teacher: _Side, agreed: int) -> np.ndarray:
    """int64 [G, 4], token ranges of both sides: start and stop of the student's, of the teacher's."""
    at_s, at_t = np.flatnonzero(student.has_bytes_n), np.flatnonzero(teacher.has_bytes_n)
    ends_s, ends_t = student.end_n[at_s], teacher.end_n[at_t]
    cuts_G = np.intersect1d(ends_s, ends_t, assume_unique=True)
    cuts_G = cuts_G[cuts_G <= agreed]
    groups_G4 = np.concatenate([_between(at_s, ends_s, cuts_G), _between(at_t, ends_t, cuts_G)], axis=1)
    broken_G = _any_of(student.role_n != TEXT, groups_G4[:, :2]) | _any_of(teacher.role_n != TEXT, groups_G4[:, 2:])
    return groups_G4[~broken_G]


def _between(at_n: np.ndarray, ends_n: np.ndarray, cuts_G: np.ndarray) -> np.ndarray:
    """int64 [G, 2], the tokens that end at each cut or between it and the one before; `at_n` are places of those with bytes."""
    last_G = np.searchsorted(ends_n, cuts_G)
    first_G = np.concatenate([np.zeros(1, np.int64), last_G[:-1] + 1])[: len(cuts_G)]
    return np.stack([at_n[first_G], at_n[last_G] + 1], axis=1).astype(np.int64)


def _control_groups(student: _Side, teacher: _Side, agreed: int) -> np.ndarray:
    """int64 [G, 4], as `_text_groups`: control tokens behind the same byte with the same role, in order."""
    pairs: list[tuple[int, int, int, int]] = []
    at_s = np.flatnonzero(np.isin(student.role_n, MATCHED_ROLES) & (student.end_n <= agreed))
    at_t = np.flatnonzero(np.isin(teacher.role_n, MATCHED_ROLES) & (teacher.end_n <= agreed))
    what_s = list(zip(student.end_n[at_s].tolist(), student.role_n[at_s].tolist(), strict=True))
    what_t = list(zip(teacher.end_n[at_t].tolist(), teacher.role_n[at_t].tolist(), strict=True))
    begin = 0
    for place, what in zip(at_s.tolist(), what_s, strict=True):
        found = next((j for j in range(begin, len(what_t)) if what_t[j] == what), None)
        if found is not None:
            other = int(at_t[found])
            pairs.append((place, place + 1, other, other + 1))
            begin = found + 1
    return np.array(pairs, np.int64).reshape(-1, 4)


def _counts(flags_n: np.ndarray) -> np.ndarray:
    """int64 [n + 1], flags set before each place."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(flags_n, dtype=np.int64)])


def _any_of(flags_n: np.ndarray, ranges_G2: np.ndarray) -> np.ndarray:
    counts_n1 = _counts(flags_n)
    return np.asarray(counts_n1[ranges_G2[:, 1]] > counts_n1[ranges_G2[:, 0]])


def _all_of(flags_n: np.ndarray, ranges_G2: np.ndarray) -> np.ndarray:
    return ~_any_of(~flags_n, ranges_G2)


def _ranks(wanted_n: np.ndarray, ranges_G2: np.ndarray) -> np.ndarray:
    """int32, the same ranges among the wanted tokens alone."""
    return _counts(wanted_n)[ranges_G2].astype(np.int32)
