"""What a replica says of its teacher: the facts of the loaded model within the limits of the config."""

from __future__ import annotations

import logging

from teacher_server.backends.base import ModelFacts
from teacher_server.config.server import TeacherConfig
from teacher_server.publishing.revisions import revision_of
from teacher_wire.core.identity import text_sha256
from teacher_wire.core.info import Limits, TeacherInfo

log = logging.getLogger(__name__)


def description(config: TeacherConfig, facts: ModelFacts) -> TeacherInfo:
    """The teacher as Describe tells of it."""
    limits = config.limits
    sequence = min(limits.max_sequence_tokens or facts.max_sequence_tokens, facts.max_sequence_tokens)
    if limits.max_sequence_tokens and limits.max_sequence_tokens > sequence:
        log.warning(
            "teacher %s: limits.max_sequence_tokens=%d is above what the model has positions for: %d is the limit",
            config.name, limits.max_sequence_tokens, sequence,
        )  # fmt: skip
    shared = {name: getattr(facts, name) for name in facts.__dataclass_fields__ if name != "max_sequence_tokens"}
    if config.deterministic:  # the same weights and other bits: labels of the two are not each other's
        shared["fingerprint"] = text_sha256(f"{facts.fingerprint} deterministic")
    return TeacherInfo(
        name=config.name,
        deterministic=config.deterministic,
        revision=revision_of(config),
        limits=Limits(
            max_sequence_tokens=sequence,
            max_request_tokens=limits.max_request_tokens,
            max_request_sequences=limits.max_request_sequences,
            max_k=min(limits.max_k, facts.vocab_rows),
            max_reply_bytes=limits.max_reply_mb << 20,
            **(_generation_limits(config, sequence) if facts.generates else {}),
        ),
        **shared,
    )


def _generation_limits(config: TeacherConfig, max_sequence_tokens: int) -> dict[str, int]:
    settings = config.generation
    return {
        "max_new_tokens": min(settings.max_new_tokens, max_sequence_tokens - 1),
        "max_samples": settings.max_samples,
        "max_generate_tokens": settings.max_call_tokens,
        "max_schema_bytes": settings.max_schema_bytes,
    }
