"""What an edge holds for its peers at most, in numbers: per stream, per tenant and per edge. The floor of `accounts`."""

from __future__ import annotations

from dataclasses import dataclass

# One message up: the ids of the longest Generate call (2^20 tokens) and its `have`; longer Score requests come in parts.
MAX_MESSAGE_BYTES = 5 << 20
KEPT_REPLY_S = 120.0  # how long a finished reply is kept for resumption


@dataclass(frozen=True)
class StreamLimits:
    """What a server holds for its peers at most. Whatever is above a limit is refused or waits; nothing is dropped.

    Attributes:
        max_window_bytes: largest reply window that a student may open.
        max_open_requests: unanswered requests of one stream.
        max_unread_refusals: refusals of one stream that the student has not read; then its stream is not read from.
        max_request_bytes: of one Score request that comes in parts.
        stall_s: a peer that takes no message for this long is dropped; so is a request whose next part does not come.
        max_calls, max_tenant_calls: open Score streams, Generate and Artifact calls, of the edge and of one tenant.
        max_artifacts, max_tenant_artifacts: of these, Artifact calls.
        max_tenant_requests: unanswered requests of one tenant, all its streams and calls together.
        max_request_held_bytes, max_tenant_request_held_bytes: bytes of unanswered requests. A single request passes.
        max_reply_held_bytes, max_tenant_reply_held_bytes: reply bytes computed, or being computed, that the peer has
            not taken. Requests beyond wait.
        unproven_reply_held_bytes: the same for a tenant that has taken nothing lately: what it took in the last
            seconds is added, so that a peer that does not read holds little and a fast one is not held up.
        kept_reply_bytes: finished replies kept for resumption, all streams together.
    """

    max_window_bytes: int = 256 << 20
    max_open_requests: int = 1024
    max_unread_refusals: int = 64
    max_request_bytes: int = 64 << 20
    stall_s: float = 120.0
    max_calls: int = 4096
    max_tenant_calls: int = 512
    max_artifacts: int = 8
    max_tenant_artifacts: int = 4
    max_tenant_requests: int = 4096
    max_request_held_bytes: int = 256 << 20
    max_tenant_request_held_bytes: int = 32 << 20
    max_reply_held_bytes: int = 2 << 30
    max_tenant_reply_held_bytes: int = 1 << 30
    unproven_reply_held_bytes: int = 64 << 20
    kept_reply_bytes: int = 64 << 20


def with_message_limit(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Channel options of a server that receives messages of `MAX_MESSAGE_BYTES` at most."""
    name = "grpc.max_receive_message_length"
    return [*(option for option in options if option[0] != name), (name, MAX_MESSAGE_BYTES)]
