"""How a server is doing: what operators see, and a tenant of itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LatencyStatus:
    """How long one stage of answering takes (proto: LatencyStatus); quantiles in seconds."""

    stage: str
    count: int = 0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0


@dataclass(frozen=True)
class TeacherStatus:
    """How one teacher is doing (proto: TeacherStatus).

    Attributes:
        state: `starting`, `running`, `rolling` or `failed`; `message` says more.
        fingerprints: of the live replicas, the newest first; several during a rolling update.
        healthy: replicas whose forward passes succeed.
        tokens_per_s, batch_fill: of the last seconds.
        forwards, forward_tokens, answered, failed, expired, cancelled, refused, retries, failed_forwards, given_up,
            generated_samples, generated_tokens: since the server came up; see proto.
        generate_calls, generate_running, generate_waiting: now; calls, and sequences of them.
        latencies: of the last minute.
        interactive_queued_tokens, interactive_queued_requests: now, of requests with latency "interactive".
        interactive_forwards, interactive_tokens, interactive_answered: since the server came up, of these.
    """

    name: str
    state: str
    message: str = ""
    replicas: int = 0
    replicas_wanted: int = 0
    fingerprints: tuple[str, ...] = ()
    queued_tokens: int = 0
    queued_requests: int = 0
    tokens_per_s: float = 0.0
    batch_fill: float = 0.0
    forwards: int = 0
    forward_tokens: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    refused: int = 0
    retries: int = 0
    healthy: int = 0
    failed_forwards: int = 0
    given_up: int = 0
    generate_calls: int = 0
    generate_running: int = 0
    generate_waiting: int = 0
    generated_samples: int = 0
    generated_tokens: int = 0
    latencies: tuple[LatencyStatus, ...] = ()
    interactive_queued_tokens: int = 0
    interactive_queued_requests: int = 0
    interactive_forwards: int = 0
    interactive_tokens: int = 0
    interactive_answered: int = 0


@dataclass(frozen=True)
class TenantStatus:
    """What one tenant takes (proto: TenantStatus); the empty name is whoever has none."""

    name: str
    weight: float = 1.0
    share: float = 0.0
    tokens_per_s: float = 0.0
    served_tokens: int = 0
    queued_tokens: int = 0
    inflight_tokens: int = 0
    refused: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class StoreStatus:
    """Where the labels of sequences came from, and what is kept (proto: StoreStatus)."""

    memory_hits: int = 0
    disk_hits: int = 0
    joined: int = 0
    computed: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    trouble: str = ""
    unshared: int = 0


@dataclass(frozen=True)
class EdgeStatus:
    """What one edge has open."""

    node: str
    open_streams: int = 0
    open_requests: int = 0


@dataclass(frozen=True)
class ServerStatus:
    """How the whole server is doing."""

    server_version: str = ""
    up_s: float = 0.0
    teachers: tuple[TeacherStatus, ...] = ()
    tenants: tuple[TenantStatus, ...] = ()
    store: StoreStatus = field(default_factory=StoreStatus)
    edges: tuple[EdgeStatus, ...] = ()
