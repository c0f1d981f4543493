"""How much of some rows a teacher with another tokenizer can teach, as figures that are known before anything is paid for.

In: alignments of rows, and the classes of both vocabularies; out: a `Coverage` for people and for JSON.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from student_trainer.data.cross_tokenizer.alignment import Alignment
from student_trainer.data.cross_tokenizer.classes import Partition
from student_trainer.losses.cross_tokenizer.bridge import GIANT
from teacher_wire.vocabulary.byte_table import TEXT, ByteTable

_LARGEST_KIND = 4  # tokens of a group on one side, up to which kinds are told apart


@dataclass
class Coverage:
    """Sums over rows; the figures are properties of them.

    Attributes:
        rows: completions, those that the teacher does not label among them.
        refused: rows that the teacher cannot tokenise or render.
        below: rows of which too little is 1-1 (`cross_tokenizer.min_coverage`), so that the teacher does not label them.
        student_tokens: supervised ones, of all rows.
        teacher_tokens: supervised ones, of rows that it labels.
        student_grouped, teacher_grouped: of these, in any group.
        one_to_one: groups of one token on both sides.
        in_giants: of the 1-1 groups, those whose token is of a class of more than `GIANT` ids; 0 where no classes are given.
        kinds: groups by tokens of the student and of the teacher.
    """

    rows: int = 0
    refused: int = 0
    below: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    student_grouped: int = 0
    teacher_grouped: int = 0
    one_to_one: int = 0
    in_giants: int = 0
    kinds: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(
        self,
        alignment: Alignment,
        student_rows: int,
        teacher_rows: int,
        student_ids_N: np.ndarray | None = None,
        classes: Partition | None = None,
    ) -> None:
        """Counts a completion.

        Args:
            alignment: its groups.
            student_rows: its supervised tokens as the student writes it.
            teacher_rows: as the teacher does.
            student_ids_N: these tokens.
            classes: of the two vocabularies.
        """
        sizes_G2 = alignment.sizes_G2
        self.rows += 1
        self.student_tokens += student_rows
        self.teacher_tokens += teacher_rows
        self.student_grouped += int(sizes_G2[:, 0].sum())
        self.teacher_grouped += int(sizes_G2[:, 1].sum())
        self.one_to_one += int(alignment.is_one_to_one_G.sum())
        if student_ids_N is not None and classes is not None:
            ids = student_ids_N[alignment.student_G2[alignment.is_one_to_one_G, 0]]
            self.in_giants += int((classes.members_K[classes.student_Vs[ids]] > GIANT).sum())
        kinds_K2, counts_K = np.unique(sizes_G2, axis=0, return_counts=True)
        for (student, teacher), count in zip(kinds_K2.tolist(), counts_K.tolist(), strict=True):
            self.kinds[student, teacher] += count

    def add_masked(self, student_rows: int, *, refused: bool = False) -> None:
        """Counts a completion that the teacher does not label: it cannot read it, or too little of it is 1-1."""
        self.rows += 1
        self.refused += refused
        self.below += not refused
        self.student_tokens += student_rows

    @property
    def groups(self) -> int:
        """All of them."""
        return self.kinds.total()

    @property
    def one_to_one_groups(self) -> float:
        """Share of the groups."""
        return _share(self.one_to_one, self.groups)

    @property
    def student_one_to_one(self) -> float:
        """Share of the student's supervised tokens that learn from a whole distribution."""
        return _share(self.one_to_one, self.student_tokens)

    @property
    def teacher_one_to_one(self) -> float:
        """Share of the teacher's supervised tokens whose distribution is learned from."""
        return _share(self.one_to_one, self.teacher_tokens)

    @property
    def student_masked(self) -> float:
        """Share of the student's supervised tokens that are in no group."""
        return _share(self.student_tokens - self.student_grouped, self.student_tokens)

    @property
    def teacher_masked(self) -> float:
        """Share of the teacher's supervised tokens that are in no group."""
        return _share(self.teacher_tokens - self.teacher_grouped, self.teacher_tokens)

    def kind_shares(self) -> dict[str, float]:
        """Share of groups of each kind, such as "1-2": tokens of the student, of the teacher; the commonest first, `more` for large ones."""
        told: Counter[str] = Counter()
        for (student, teacher), count in self.kinds.items():
            told["more" if max(student, teacher) > _LARGEST_KIND else f"{student}-{teacher}"] += count
        return {kind: _share(count, self.groups) for kind, count in told.most_common()}

    def figures(self) -> dict[str, float]:
        """All of them by name, for a table."""
        return {
            "rows": self.rows,
            "refused rows": self.refused,
            "rows below min_coverage": self.below,
            "student tokens": self.student_tokens,
            "teacher tokens": self.teacher_tokens,
            "1-1 of groups": self.one_to_one_groups,
            "1-1 of student tokens": self.student_one_to_one,
            "1-1 of teacher tokens": self.teacher_one_to_one,
            "1-1 in large classes": _share(self.in_giants, self.one_to_one),
            "masked student tokens": self.student_masked,
            "masked teacher tokens": self.teacher_masked,
        }


@dataclass(frozen=True)
class ClassFigures:
    """What a partition is like.

    Attributes:
        classes: all of them.
        pairs: share of the classes that are one id on both sides.
        largest: ids of both sides in the largest class but that of ids without a partner.
        other: ids of both sides without a partner, control tokens and ids beyond the tokenizers among them.
        digits_strict: share of the ids of both sides that are numbers of two or more digits whose bytes the other side has too: what a
            matching by equal bytes keeps of them. 1 where there are none.
        digits_kept: share of these ids that are of a class with digits of the other side.
    """

    classes: int
    pairs: float
    largest: int
    other: int
    digits_strict: float
    digits_kept: float

    def figures(self) -> dict[str, float]:
        """By name, for a table."""
        return {
            "classes": self.classes,
            "pairs of classes": self.pairs,
            "largest class": self.largest,
            "ids without partner": self.other,
            "numbers matched by bytes": self.digits_strict,
            "numbers kept": self.digits_kept,
        }


def class_figures(partition: Partition, student: ByteTable, teacher: ByteTable) -> ClassFigures:
    """What a partition of these two vocabularies is like."""
    members_K = partition.members_K
    other = 0 if partition.other is None else int(members_K[partition.other])
    texts_K = members_K.copy()
    if partition.other is not None:
        texts_K[partition.other] = 0
    numbers = [_numbers(table) for table in (student, teacher)]
    sides = (partition.student_Vs, partition.teacher_Vt)
    of_digits = [
        set(class_V[np.fromiter(held.values(), np.int64)].tolist())
        for class_V, held in zip(sides, numbers, strict=True)
    ]
    long = strict = kept = 0
    for side, class_V in enumerate(sides):
        for text, token_id in numbers[side].items():
            if len(text) > 1:
                long += 1
                strict += text in numbers[1 - side]
                kept += int(class_V[token_id]) in of_digits[1 - side]
    return ClassFigures(
        partition.classes,
        _share(int(partition.is_pair_K.sum()), partition.classes),
        int(texts_K.max(initial=0)),
        other,
        _share(strict, long, 1.0),
        _share(kept, long, 1.0),
    )


def _numbers(table: ByteTable) -> dict[bytes, int]:
    """Ids of ASCII digits and nothing else, by their bytes."""
    held: dict[bytes, int] = {}
    for token_id in np.flatnonzero(np.asarray(table.role_V) == TEXT).tolist():
        text = table.of(token_id)
        if text.isdigit():
            held.setdefault(text, token_id)
    return held


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return float(part) / float(whole) if whole else empty
