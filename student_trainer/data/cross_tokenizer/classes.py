"""A partition of two vocabularies in which every class has ids of both, so that their distributions can be compared (docs/concepts/method.md 8.4).

In: the byte tables of both, and which token each tokenizer begins a text with; out: the class of every id. Ids with the same bytes are of
one class; an id whose bytes the other vocabulary lacks is of the class of the token that the other tokenizer begins these bytes with: "123"
is of the class of "1" where the other splits digits. Nothing here decides how a text is tokenised.

Axes: Vs ids of the student, Vt of the teacher; S distinct byte strings of both; K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from teacher_wire.labels.files import replacing
from teacher_wire.vocabulary.byte_table import BOS, END, TEXT, THINK_CLOSE, THINK_OPEN, ByteTable

if TYPE_CHECKING:
    import torch

    from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses

FirstTokens = Callable[[Sequence[bytes]], np.ndarray]
"""int64, of each text, which is valid UTF-8 and not empty: the first token with bytes that a tokenizer writes it with; -1 for none."""

FOLDER = "tokens"  # in a cache folder: beside tokenised rows, whose budget they share
_ROLES = (BOS, END, THINK_OPEN, THINK_CLOSE)  # of control tokens that mean the same in every tokenizer
_RULE = 1  # of the partition; kept ones of another rule are made anew


@dataclass(frozen=True, eq=False)
class Partition:
    """The class of every id of both sides.

    Attributes:
        student_Vs: int64, from 0 to K.
        teacher_Vt: int64.
        classes: K; every class has ids of both sides.
        other: the class of ids without a partner, of control tokens and of ids beyond the tokenizers; None if both sides have none.
    """

    student_Vs: np.ndarray
    teacher_Vt: np.ndarray
    classes: int
    other: int | None

    @cached_property
    def members_K(self) -> np.ndarray:
        """int64 [K], ids of both sides in each class."""
        return self.of_student_K + self.of_teacher_K

    @property
    def of_student_K(self) -> np.ndarray:
        """int64 [K], the student's ids in each class."""
        return np.bincount(self.student_Vs, minlength=self.classes)

    @property
    def of_teacher_K(self) -> np.ndarray:
        """int64 [K], the teacher's ids in each class."""
        return np.bincount(self.teacher_Vt, minlength=self.classes)

    @property
    def is_pair_K(self) -> np.ndarray:
        """bool [K], classes of one id on both sides."""
        return np.asarray((self.of_student_K == 1) & (self.of_teacher_K == 1))

    def on(self, device: torch.device | str) -> VocabularyClasses:
        """As the losses read it."""
        import torch

        from student_trainer.losses.cross_tokenizer.bridge import VocabularyClasses

        return VocabularyClasses(
            torch.from_numpy(self.student_Vs).to(device), torch.from_numpy(self.teacher_Vt).to(device), self.classes
        )


def vocabulary_classes(
    student: ByteTable, teacher: ByteTable, first_of_student: FirstTokens, first_of_teacher: FirstTokens
) -> Partition:
    """The partition of two vocabularies; of two equal tables that of every id with itself.

    Args:
        student: bytes and roles of the student's ids.
        teacher: of the teacher's.
        first_of_student: how the student's tokenizer begins texts that the teacher has a token for.
        first_of_teacher: likewise.
    """
    if _equal(student, teacher):
        identity_V = np.arange(len(student), dtype=np.int64)
        return Partition(identity_V, identity_V.copy(), len(student), None)
    texts = _Texts(student, teacher)
    parent_S = np.arange(len(texts.all), dtype=np.int64)
    parent_S[texts.lacks(1)] = _partners(texts, texts.lacks(1), texts.id_of[1], teacher, first_of_teacher)
    parent_S[texts.lacks(0)] = _partners(texts, texts.lacks(0), texts.id_of[0], student, first_of_student)
    root_S = _roots(parent_S)
    of_both_S2 = np.zeros_like(texts.has_S2)
    np.logical_or.at(of_both_S2, root_S, texts.has_S2)
    is_class_S = (of_both_S2[:, 0] & of_both_S2[:, 1])[root_S]
    return _numbered(student, teacher, texts, root_S, is_class_S)


def kept_classes(folder: Path, key: str, make: Callable[[], Partition]) -> Partition:
    """The partition kept under `key`, or `make`'s, which is then kept; a folder that takes no file is no error.

    Args:
        folder: of partitions, made if it is missing.
        key: digest of both tables and both tokenizers (`classes_key`).
        make: makes it.
    """
    path = folder / f"{key}.safetensors"
    found = _read(path, key)
    if found is not None:
        return found
    made = make()
    tensors: dict[str, np.ndarray] = {
        "student_Vs": made.student_Vs.astype(np.int32),
        "teacher_Vt": made.teacher_Vt.astype(np.int32),
        "sizes": np.array([made.classes, -1 if made.other is None else made.other], np.int64),
    }
    with contextlib.suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False, shared=True) as partial:
            save_file(tensors, partial, {"key": key, "sha256": _digest(tensors)})
    return made


def classes_key(student: ByteTable, teacher: ByteTable, student_tokenizer: str, teacher_tokenizer: str) -> str:
    """The name of a partition on disk.

    Args:
        student: its byte table.
        teacher: likewise.
        student_tokenizer: digest of all that decides how a text is tokenised, such as that of tokenizer.json.
        teacher_tokenizer: likewise.
    """
    digest = hashlib.sha256(f"{_RULE} {student_tokenizer} {teacher_tokenizer} ".encode())
    for table in (student, teacher):
        for array in (table.bytes_B, table.ends_V1, table.role_V):
            digest.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class _Texts:
    """The distinct byte strings of both vocabularies.

    Attributes:
        all: S of them, those of the student first.
        of_id: for both sides int64 [V], the string of every id; -1 for ids without bytes.
        id_of: for both sides, the lowest id of a string.
        has_S2: bool, whether a side has a token for the string.
    """

    def __init__(self, student: ByteTable, teacher: ByteTable) -> None:
        number: dict[bytes, int] = {}
        self.of_id: list[np.ndarray] = []
        self.id_of: list[dict[bytes, int]] = []
        for table in (student, teacher):
            of_id_V = np.full(len(table), -1, np.int64)
            id_of: dict[bytes, int] = {}
            whole, ends = np.asarray(table.bytes_B).tobytes(), table.ends_V1.tolist()
            is_text = (np.asarray(table.role_V) == TEXT) & (np.diff(table.ends_V1) > 0)
            for token_id in np.flatnonzero(is_text).tolist():
                text = whole[ends[token_id] : ends[token_id + 1]]
                of_id_V[token_id] = number.setdefault(text, len(number))
                id_of.setdefault(text, token_id)
            self.of_id.append(of_id_V)
            self.id_of.append(id_of)
        self.all = list(number)
        self.has_S2 = np.zeros((len(number), 2), np.bool_)
        for side, of_id_V in enumerate(self.of_id):
            self.has_S2[of_id_V[of_id_V >= 0], side] = True

    def lacks(self, side: int) -> np.ndarray:
        """int64, the strings that a side has no token for."""
        return np.flatnonzero(~self.has_S2[:, side])


def _partners(
    texts: _Texts, lacking: np.ndarray, id_of: dict[bytes, int], table: ByteTable, first: FirstTokens
) -> np.ndarray:
    """int64, for each of the lacking strings the string of the token that this side begins it with; itself where there is none."""
    of_id_V = texts.of_id[0 if id_of is texts.id_of[0] else 1]
    partner = lacking.copy()
    asked = [place for place, string in enumerate(lacking.tolist()) if _is_utf8(texts.all[string])]
    first_ids = np.full(len(lacking), -1, np.int64)
    if asked:
        first_ids[asked] = first([texts.all[lacking[place]] for place in asked])
    for place, (string, token_id) in enumerate(zip(lacking.tolist(), first_ids.tolist(), strict=True)):
        text = texts.all[string]
        begins = table.of(token_id) if 0 <= token_id < len(table) else b""
        if begins and text.startswith(begins) and of_id_V[token_id] >= 0:
            partner[place] = of_id_V[token_id]
        else:  # no UTF-8, or a token that stands for more than what it is the first of
            found = _longest_prefix(text, id_of)
            if found is not None:
                partner[place] = of_id_V[found]
    return partner


def _longest_prefix(text: bytes, id_of: dict[bytes, int]) -> int | None:
    return next((id_of[text[:length]] for length in range(len(text) - 1, 0, -1) if text[:length] in id_of), None)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _roots(parent_S: np.ndarray) -> np.ndarray:
    """Where the way from each string to its partner, and to the partner's partner, ends: strings become shorter on it."""
    while True:
        further_S = parent_S[parent_S]
        if np.array_equal(further_S, parent_S):
            return parent_S
        parent_S = further_S


def _numbered(
    student: ByteTable, teacher: ByteTable, texts: _Texts, root_S: np.ndarray, is_class_S: np.ndarray
) -> Partition:
    """Classes in the order of their strings, then those of roles, then that of all other ids."""
    number_S = np.cumsum(np.bincount(root_S[is_class_S], minlength=len(root_S)) > 0) - 1
    class_S = np.where(is_class_S, number_S[root_S], -1)
    classes = int(class_S.max(initial=-1)) + 1
    sides = []
    for of_id_V in texts.of_id:
        class_V = np.full(len(of_id_V), -1, np.int64)
        class_V[of_id_V >= 0] = class_S[of_id_V[of_id_V >= 0]]
        sides.append(class_V)
    roles = [np.asarray(table.role_V) for table in (student, teacher)]
    for role in _ROLES:
        if all((role_V == role).any() for role_V in roles):
            for class_V, role_V in zip(sides, roles, strict=True):
                class_V[role_V == role] = classes
            classes += 1
    alone = [class_V < 0 for class_V in sides]
    other: int | None = None
    if all(some.any() for some in alone):
        other, classes = classes, classes + 1
        for class_V, some in zip(sides, alone, strict=True):
            class_V[some] = other
    for side, some in enumerate(alone):
        if some.any() and other is None:  # the other side has an id for each of its own: with its control tokens
            control = np.flatnonzero(roles[1 - side] != TEXT)
            sides[side][some] = sides[1 - side][control[0] if control.size else 0]
    if other is None and any(some.any() for some in alone):
        side = 0 if alone[0].any() else 1
        other = int(sides[side][alone[side]][0])
    return Partition(sides[0], sides[1], classes, other)


def _equal(one: ByteTable, another: ByteTable) -> bool:
    return one is another or all(
        np.array_equal(getattr(one, name), getattr(another, name)) for name in ("bytes_B", "ends_V1", "role_V")
    )


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(
        b"".join(tensors[name].tobytes() for name in ("student_Vs", "teacher_Vt", "sizes"))
    ).hexdigest()


def _read(path: Path, key: str) -> Partition | None:
    """A kept partition; None if there is none, or a damaged one."""
    try:
        with safe_open(path, framework="np") as file:
            told = file.metadata() or {}
            kept: dict[str, np.ndarray] = {
                name: file.get_tensor(name) for name in ("student_Vs", "teacher_Vt", "sizes")
            }
    except (OSError, ValueError, SafetensorError):
        return None
    if told.get("key") != key or told.get("sha256") != _digest(kept):
        return None
    with contextlib.suppress(OSError):  # what was not read for the longest time goes first; a cache may be read-only
        os.utime(path)
    classes, other = (int(value) for value in kept["sizes"])
    return Partition(
        kept["student_Vs"].astype(np.int64), kept["teacher_Vt"].astype(np.int64), classes, None if other < 0 else other
    )
