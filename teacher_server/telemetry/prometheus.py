"""The counters of replicas and edges as Prometheus metrics, exported by Ray on every node's metrics port.

In: the same totals and gauges that go to the cluster state; out: `lyceum_*` series. docs/operate/operating.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from teacher_server.telemetry.latency import BOUNDS_S

_Table = dict[str, tuple[str, dict[str, str]]]
# counter of ours -> (metric, its own tags); totals become Counters, the rest Gauges
_REPLICA: _Table = {
    "queued_tokens": ("queued_tokens", {}),
    "queued_jobs": ("queued_requests", {}),
    "forwards": ("forwards", {}),
    "forward_tokens": ("forward_tokens", {}),
    "answered": ("requests", {"outcome": "answered"}),
    "failed": ("requests", {"outcome": "failed"}),
    "expired": ("requests", {"outcome": "expired"}),
    "cancelled": ("requests", {"outcome": "cancelled"}),
    "refused": ("requests", {"outcome": "refused"}),
    "failed_forwards": ("failed_forwards", {}),
    "healthy": ("replicas_healthy", {}),
    "given_up": ("given_up", {}),
    "generate_calls": ("generate_calls", {}),
    "generate_running": ("generate_sequences", {"state": "running"}),
    "generate_waiting": ("generate_sequences", {"state": "waiting"}),
    "generate_waiting_tokens": ("generate_waiting_tokens", {}),
    "generate_failed_steps": ("generate_failed_steps", {}),
    "generated_samples": ("generated_samples", {}),
    "generated_tokens": ("generated_tokens", {}),
    "interactive_queued_tokens": ("interactive_queued_tokens", {}),
    "interactive_queued_requests": ("interactive_queued_requests", {}),
    "interactive_forwards": ("interactive_forwards", {}),
    "interactive_tokens": ("interactive_tokens", {}),
    "interactive_answered": ("interactive_answered", {}),
    "tokenized_rows": ("tokenized_rows", {}),
    "tokenized_bytes": ("tokenized_bytes", {}),
    "tokenize_refused": ("tokenize_refused_rows", {}),
}
_EDGE: _Table = {
    "open_streams": ("open_streams", {}),
    "open_requests": ("open_requests", {}),
    "store.memory_hits": ("store_sequences", {"found": "memory"}),
    "store.disk_hits": ("store_sequences", {"found": "disk"}),
    "store.joined": ("store_sequences", {"found": "under_way"}),
    "store.computed": ("store_sequences", {"found": "nowhere"}),
    "store.unshared": ("store_sequences", {"found": "not_looked_for"}),
    "store.memory_bytes": ("store_bytes", {"where": "memory"}),
    "store.disk_bytes": ("store_bytes", {"where": "disk"}),
}
_PLAN: _Table = {"replicas": ("replicas", {}), "replicas_wanted": ("replicas_wanted", {})}
_TENANT: _Table = {
    "served_tokens": ("tenant_served_tokens", {}),
    "queued_tokens": ("tenant_queued_tokens", {}),
    "inflight_tokens": ("tenant_inflight_tokens", {}),
    "sent_bytes": ("tenant_sent_bytes", {}),
    "refused": ("tenant_refused", {}),
}
_TOTALS = {
    "forwards": "forward passes",
    "forward_tokens": "tokens through forward passes",
    "requests": "requests that ended, by outcome",
    "store_sequences": "sequences by where their labels were found",
    "tenant_served_tokens": "tokens computed for a tenant",
    "tenant_sent_bytes": "bytes of labels sent to a tenant",
    "tenant_refused": "requests of a tenant over a quota or a queue limit",
    "failed_forwards": "forward passes that raised",
    "given_up": "replicas that could compute nothing any more",
    "generate_failed_steps": "steps of writing that raised",
    "generated_samples": "samples written",
    "generated_tokens": "tokens written",
    "retries": "attempts of an edge beyond the first, by teacher",
    "interactive_forwards": "forward passes of interactive requests",
    "interactive_tokens": "tokens of interactive requests through forward passes",
    "interactive_answered": "interactive requests that were answered",
    "tokenized_rows": "rows of Tokenize",
    "tokenized_bytes": "bytes of the rows of Tokenize",
    "tokenize_refused_rows": "rows of Tokenize that were refused",
}
_NOW = {
    "queued_tokens": "tokens that wait for a forward pass",
    "queued_requests": "requests that wait for a forward pass",
    "open_streams": "streams of students",
    "open_requests": "unanswered requests of students",
    "store_bytes": "bytes of kept labels",
    "replicas": "replicas of a teacher that answer",
    "replicas_wanted": "replicas of a teacher that answer or are on their way",
    "replicas_healthy": "1 while the forward passes of a replica succeed",
    "generate_calls": "open calls of Generate",
    "generate_sequences": "sequences of Generate, by state",
    "generate_waiting_tokens": "what waiting sequences may come to hold",
    "tenant_queued_tokens": "tokens of a tenant that wait",
    "tenant_inflight_tokens": "tokens of a tenant waiting or being computed",
    "interactive_queued_tokens": "tokens of interactive requests that wait for a forward pass",
    "interactive_queued_requests": "interactive requests that wait for a forward pass",
}


class Exported:
    """The metrics of one process.

    Args:
        tags: of every series, such as teacher and replica.
    """

    def __init__(self, **tags: str) -> None:
        self._tags = tags
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._last: dict[tuple[str, ...], float] = {}

    def show(self, counters: Mapping[str, Any]) -> None:
        """Exports the counters of a replica or an edge, or a plan, as they are now."""
        for name, tags, value in _series(counters):
            if name in _TOTALS:
                key = (name, *tags.values())
                grown = value - self._last.get(key, 0.0)
                if grown > 0:
                    self._metric(Counter, name, _TOTALS[name], tags).inc(grown, {**self._tags, **tags})
                    self._last[key] = value
            else:
                self._metric(Gauge, name, _NOW[name], tags).set(value, {**self._tags, **tags})

    def observe(self, stage: str, seconds: float, **tags: str) -> None:
        """Adds one latency; see `latency.STAGES`."""
        name = "latency_seconds"
        own = {**self._tags, **tags, "stage": stage}
        if name not in self._metrics:
            self._metrics[name] = Histogram(f"lyceum_{name}", "time of a stage", list(BOUNDS_S), tuple(own))
        self._metrics[name].observe(seconds, own)

    def _metric(self, kind: type, name: str, text: str, tags: Mapping[str, str]) -> Any:
        if name not in self._metrics:
            self._metrics[name] = kind(f"lyceum_{name}", text, (*self._tags, *tags))
        return self._metrics[name]


def _series(counters: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Metric, own tags and value of every counter that is exported."""
    for key, (name, tags) in {**_REPLICA, **_EDGE, **_PLAN}.items():
        value: Any = counters
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            yield name, dict(tags), float(value)
    by_teacher = counters.get("retries")
    for teacher, retries in by_teacher.items() if isinstance(by_teacher, Mapping) else ():
        yield "retries", {"teacher": teacher}, float(retries)
    for tenant, row in counters.get("tenants", {}).items():
        for key, (name, tags) in _TENANT.items():
            if isinstance(row.get(key), int | float):
                yield name, {"tenant": tenant, **tags}, float(row[key])
