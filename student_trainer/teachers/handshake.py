"""Before step 0: is this the teacher we can learn from, with these data and these losses?

In: the teacher's own description, our tokenizer, data and label settings; out: the SignalSpec of the whole run.
Everything that cannot work ends here, with the name of the setting; nothing is negotiated later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from student_trainer.config.teachers import LabelConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.teacher_view import TeacherView
from student_trainer.findings import Finding, Findings
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError
from teacher_wire.core.identity import (
    added_tokens,
    base_tokenizer_sha256,
    differing_added_tokens,
    template_sha256,
    tokenizer_sha256,
)
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.score.signals import spec_of

BYTE_TABLE = "byte_table"  # kind of artifact


@dataclass(frozen=True)
class StudentFacts:
    """What the handshake needs to know of the student.

    Attributes:
        vocab_rows: rows of the output head.
        tokenizer_size: ids the tokenizer can produce.
        chat_template_sha256: of the template that rendered the data.
        uses_chat_template: whether the data are rendered with one.
        tokens: its tokenizer in parts, for teachers whose tokenizer differs in added tokens only; None: not told.
    """

    vocab_rows: int
    tokenizer_size: int
    tokenizer_sha256: str
    chat_template_sha256: str
    uses_chat_template: bool
    tokens: TokensSeen | None = None

    @classmethod
    def of(
        cls, tokenizer: Any, vocab_rows: int, uses_chat_template: bool, *datasets: TokenizedDataset | None
    ) -> StudentFacts:
        """The facts of a fast tokenizer, an output head and the data, whose rendering decides which chat template counts."""
        rendering = next((data.rendering for data in datasets if data is not None and data.rendering is not None), None)
        return cls(
            vocab_rows=vocab_rows,
            tokenizer_size=len(tokenizer),
            tokenizer_sha256=tokenizer_sha256(tokenizer.backend_tokenizer.to_str()),
            chat_template_sha256=rendering.template_sha256 if rendering else template_sha256(tokenizer.chat_template),
            uses_chat_template=bool(rendering.template_sha256) if rendering else uses_chat_template,
            tokens=TokensSeen(tokenizer, [data for data in datasets if data is not None]),
        )


class TokensSeen:
    """A tokenizer and the data it made: whether other added tokens would have made other ids of them."""

    def __init__(self, tokenizer: Any, datasets: Sequence[TokenizedDataset]) -> None:
        self._tokenizer = tokenizer
        self._datasets = datasets
        self._said: dict[tuple[str, str], str] = {}

    def same_as(self, info: TeacherInfo) -> str:
        """A sentence, if the teacher's tokenizer gives the same ids to all of the data; "" if that cannot be said."""
        key = info.base_tokenizer_sha256, info.added_tokens
        if key not in self._said:
            self._said[key] = self._compare(info)
        return self._said[key]

    def _compare(self, info: TeacherInfo) -> str:
        written = self._tokenizer.backend_tokenizer.to_str()
        if not info.base_tokenizer_sha256 or info.base_tokenizer_sha256 != base_tokenizer_sha256(written):
            return ""
        differing = differing_added_tokens(added_tokens(written), info.added_tokens)
        if differing is None:
            return ""
        ours, theirs = differing
        if any(set(ours.values()) & set(example.token_ids.tolist()) for example in self._examples()):
            return ""
        texts = set(ours) | set(
            theirs
        )  # ours too: a text that holds one may be cut otherwise without its id being there
        pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        for example in self._examples():
            if pattern.search(self._tokenizer.decode(example.token_ids, clean_up_tokenization_spaces=False)):
                return ""
        named = ", ".join(repr(text) for text in sorted(texts)[:4]) + (", ..." if len(texts) > 4 else "")
        return f"its tokenizer differs from the student's in added tokens alone ({named}), of which no row has any: all ids are equal"

    def _examples(self) -> Iterator[TeacherView]:
        """All that the teacher is asked; of the student's own prompts it sees nothing else."""
        return (item.example.asked for data in self._datasets for item in data)


def shared_rows(info: TeacherInfo, student: StudentFacts) -> int:
    """V: ids that both heads and the tokenizer have. Rows beyond the tokenizer are untrained padding and differ between
    sizes of one family (docs/concepts/method.md 1.6).
    """
    return min(student.vocab_rows, info.vocab_rows, student.tokenizer_size)


def is_bridged(found: object, student: StudentFacts) -> bool:
    """Whether a teacher, as it describes itself, has another tokenizer than the student, whose tokens can be joined to the student's."""
    if not isinstance(found, TeacherInfo) or found.tokenizer_sha256 == student.tokenizer_sha256:
        return False
    offered = any(artifact.kind == BYTE_TABLE for artifact in found.artifacts)
    return offered and not (student.tokens and student.tokens.same_as(found))


def agree(
    info: TeacherInfo,
    student: StudentFacts,
    labels: LabelConfig,
    findings: Findings,
    *,
    asked_by: str,
    longest: tuple[str, int],
    allow_template_mismatch: bool = False,
    bridged_rows: int | None = None,
) -> SignalSpec | None:
    """The signal both sides can work with; None where findings are bad and do not stop there.

    Args:
        info: the teacher.
        student: the student.
        labels: the wanted transport.
        findings: takes what is found.
        asked_by: the loss that needs it, for errors.
        longest: name and tokens of the longest sequence of the data.
        allow_template_mismatch: learn although chat templates differ.
        bridged_rows: V of a teacher with another tokenizer, which renders its prompts itself; None for one of the student's.

    Raises:
        MismatchError: another tokenizer or chat template.
        CapabilityError: a transport the teacher does not offer; names `asked_by`.
        LimitError: a sequence above the teacher's limit.
        ConfigError: k outside the vocabulary or above the teacher's limit.
    """
    assert labels.transport != "auto", "chosen before: see teachers/choose.py"
    if not findings.add(_compare(info, student, labels, asked_by, longest, allow_template_mismatch, bridged_rows)):
        return None
    return signal_of(labels, shared_rows(info, student) if bridged_rows is None else bridged_rows)


def _compare(
    info: TeacherInfo,
    student: StudentFacts,
    labels: LabelConfig,
    asked_by: str,
    longest: tuple[str, int],
    allow_template_mismatch: bool,
    bridged_rows: int | None,
) -> Iterator[Finding]:
    if bridged_rows is None:
        yield from _compare_tokens(info, student, allow_template_mismatch)
    if labels.transport not in info.transports:
        yield Finding.of("labels.transport", CapabilityError(
            f"{asked_by} asks for labels.transport={labels.transport}, which teacher {info.name!r} does not offer",
            field="labels.transport", value=labels.transport, limit="|".join(info.transports),
        ))  # fmt: skip
    else:
        yield Finding.good(
            "labels.transport", f"teacher {info.name!r} offers {labels.transport}, which {asked_by} asks for"
        )
    if labels.transport == "top_k":
        vocab_rows = shared_rows(info, student) if bridged_rows is None else bridged_rows
        limit = min(vocab_rows, info.limits.max_k) - labels.extra_ids
        what = "the vocabulary" if vocab_rows <= info.limits.max_k else f"the limit of teacher {info.name!r}"
        beside = f" beside extra_ids={labels.extra_ids}" if labels.extra_ids else ""
        if labels.k > limit:
            yield Finding.bad(
                "labels.k", f"labels.k={labels.k} is above {what}", f"at most {limit}{beside}", joint=": "
            )
        else:
            yield Finding.good("labels.k", f"labels.k={labels.k} is within {what}{beside}")
    name, tokens = longest
    if tokens > info.limits.max_sequence_tokens:
        yield Finding.of("data.max_tokens", LimitError(
            f"{name} is longer than teacher {info.name!r} accepts; lower data.max_tokens",
            field="tokens", value=tokens, limit=info.limits.max_sequence_tokens,
        ), f"lower data.max_tokens to {info.limits.max_sequence_tokens}")  # fmt: skip
    else:
        yield Finding.good(
            "data.max_tokens",
            f"the longest sequence, {name}, has {tokens:,} tokens of at most {info.limits.max_sequence_tokens:,}",
        )


def _compare_tokens(info: TeacherInfo, student: StudentFacts, allow_template_mismatch: bool) -> Iterator[Finding]:
    if info.tokenizer_sha256 != student.tokenizer_sha256 and not (student.tokens and student.tokens.same_as(info)):
        yield Finding.of("teacher", MismatchError(
            f"teacher {info.name!r} ({info.model}) has another tokenizer than the student: its labels would be for other tokens",
            field="tokenizer_sha256", value=info.tokenizer_sha256[:16] or "none", limit=student.tokenizer_sha256[:16],
        ))  # fmt: skip
    else:
        yield Finding.good("teacher", f"teacher {info.name!r} reads our tokens as the student does")
    template_differs = info.chat_template_sha256 != student.chat_template_sha256
    if student.uses_chat_template and template_differs and not allow_template_mismatch:
        yield Finding.of("teacher.allow_template_mismatch", MismatchError(
            f"teacher {info.name!r} has another chat template than the student; "
            "set teacher.allow_template_mismatch=true if its labels for our rendering are what you want",
            field="chat_template_sha256", value=info.chat_template_sha256[:16] or "none", limit=student.chat_template_sha256[:16],
        ))  # fmt: skip
    else:
        yield Finding.good(
            "teacher.allow_template_mismatch",
            f"chat templates {'differ, as allowed' if template_differs else 'are equal'}",
        )


def signal_of(labels: LabelConfig, vocab_rows: int) -> SignalSpec:
    """The request that a config means."""
    if labels.transport == "top_k":
        return spec_of("top_k", vocab_rows, k=labels.k, extra=labels.extra_ids)
    if labels.transport == "hidden":
        return spec_of("hidden", vocab_rows, labels.check, reduction=labels.compression)
    return spec_of(labels.transport, vocab_rows)
