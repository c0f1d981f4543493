"""Before step 0: is this the teacher we can learn from, with these data and these losses?

In: the teacher's own description, our tokenizer, data and label settings; out: the SignalSpec of the whole run.
Everything that cannot work ends here, with the name of the setting; nothing is negotiated later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from student_trainer.config import LabelConfig
from student_trainer.errors import ConfigError
from teacher_wire.errors import CapabilityError, LimitError, MismatchError
from teacher_wire.identity import text_sha256, tokenizer_sha256
from teacher_wire.messages import SignalSpec, TeacherInfo


@dataclass(frozen=True)
class StudentFacts:
    """What the handshake needs to know of the student.

    Attributes:
        vocab_rows: rows of the output head.
        tokenizer_size: ids the tokenizer can produce.
        uses_chat_template: whether the data are rendered with it.
    """

    vocab_rows: int
    tokenizer_size: int
    tokenizer_sha256: str
    chat_template_sha256: str
    uses_chat_template: bool

    @classmethod
    def of(cls, tokenizer: Any, vocab_rows: int, uses_chat_template: bool) -> StudentFacts:
        """The facts of a fast tokenizer and an output head."""
        return cls(
            vocab_rows=vocab_rows,
            tokenizer_size=len(tokenizer),
            tokenizer_sha256=tokenizer_sha256(tokenizer.backend_tokenizer.to_str()),
            chat_template_sha256=text_sha256(tokenizer.chat_template),
            uses_chat_template=uses_chat_template,
        )


def shared_rows(info: TeacherInfo, student: StudentFacts) -> int:
    """V: ids that both heads and the tokenizer have. Rows beyond the tokenizer are untrained padding and differ between
    sizes of one family (algorithms.md 1.6).
    """
    return min(student.vocab_rows, info.vocab_rows, student.tokenizer_size)


def agree(
    info: TeacherInfo,
    student: StudentFacts,
    labels: LabelConfig,
    *,
    asked_by: str,
    longest: tuple[str, int],
    allow_template_mismatch: bool = False,
) -> SignalSpec:
    """The signal both sides can work with.

    Args:
        info: the teacher.
        student: the student.
        labels: the wanted transport.
        asked_by: the loss that needs it, for errors.
        longest: name and tokens of the longest sequence of the data.
        allow_template_mismatch: learn although chat templates differ.

    Raises:
        MismatchError: another tokenizer or chat template.
        CapabilityError: a transport the teacher does not offer; names `asked_by`.
        LimitError: a sequence above the teacher's limit.
        ConfigError: k outside the vocabulary or above the teacher's limit.
    """
    if info.tokenizer_sha256 != student.tokenizer_sha256:
        raise MismatchError(
            f"teacher {info.name!r} ({info.model}) has another tokenizer than the student: its labels would be for other tokens",
            field="tokenizer_sha256", value=info.tokenizer_sha256[:16] or "none", limit=student.tokenizer_sha256[:16],
        )  # fmt: skip
    template_differs = info.chat_template_sha256 != student.chat_template_sha256
    if student.uses_chat_template and template_differs and not allow_template_mismatch:
        raise MismatchError(
            f"teacher {info.name!r} has another chat template than the student; "
            "set teacher.allow_template_mismatch=true if its labels for our rendering are what you want",
            field="chat_template_sha256", value=info.chat_template_sha256[:16] or "none", limit=student.chat_template_sha256[:16],
        )  # fmt: skip
    assert labels.transport != "auto", "chosen before: see feed/choose.py"
    if labels.transport not in info.transports:
        raise CapabilityError(
            f"{asked_by} asks for labels.transport={labels.transport}, which teacher {info.name!r} does not offer",
            field="labels.transport", value=labels.transport, limit="|".join(info.transports),
        )  # fmt: skip
    vocab_rows = shared_rows(info, student)
    if labels.transport == "top_k":
        limit = min(vocab_rows, info.limits.max_k) - labels.extra_ids
        if labels.k > limit:
            what = "the vocabulary" if vocab_rows <= info.limits.max_k else f"the limit of teacher {info.name!r}"
            beside = f" beside extra_ids={labels.extra_ids}" if labels.extra_ids else ""
            raise ConfigError(f"labels.k={labels.k} is above {what}: at most {limit}{beside}")
    name, tokens = longest
    if tokens > info.limits.max_sequence_tokens:
        raise LimitError(
            f"{name} is longer than teacher {info.name!r} accepts; lower data.max_tokens",
            field="tokens", value=tokens, limit=info.limits.max_sequence_tokens,
        )  # fmt: skip
    kept = labels.k if labels.transport == "top_k" else 0
    return SignalSpec(labels.transport, vocab_rows, kept, labels.extra_ids, labels.compression)
