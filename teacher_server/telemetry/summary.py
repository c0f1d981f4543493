"""From the reports that the cluster state holds to a `ServerStatus`: sums, rates and shares, as pure functions.

In: `Source`s with their recent past, and last words of those who are gone; out: one status.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from teacher_server import __version__
from teacher_server.config.server import DEFAULT_TENANT, TenantConfig
from teacher_server.telemetry.latency import STAGES, quantile_s
from teacher_server.telemetry.records import EdgeReport, News, Plan, ReplicaReport, Source, TeacherPlan
from teacher_wire.core.status import EdgeStatus, LatencyStatus, ServerStatus, StoreStatus, TeacherStatus, TenantStatus

RATE_S = 10.0  # rates are over this time
SHARE_S = 60.0  # shares of tenants are over this time

# Totals of a teacher and where they are in its counters; gauges are not kept of those who are gone.
_TEACHER_TOTALS = (
    "forwards", "forward_tokens", "answered", "failed", "expired", "cancelled", "refused", "failed_forwards", "given_up",
    "generated_samples", "generated_tokens", "interactive_forwards", "interactive_tokens", "interactive_answered",
)  # fmt: skip
_TEACHER_NOW = (
    "generate_calls", "generate_running", "generate_waiting", "interactive_queued_tokens", "interactive_queued_requests",
)  # fmt: skip
_STORE_TOTALS = ("memory_hits", "disk_hits", "joined", "computed", "unshared")


def summarise(
    plan: Plan,
    news: News,
    sources: Sequence[Source],
    gone: Sequence[ReplicaReport | EdgeReport],
    now_s: float,
    born_s: float,
) -> ServerStatus:
    """The status of a whole server at `now_s`."""
    replicas = [source for source in sources if isinstance(source.latest, ReplicaReport)]
    edges = [source for source in sources if isinstance(source.latest, EdgeReport)]
    names = [*plan.teachers, *sorted({_teacher(source.latest) for source in replicas} - set(plan.teachers))]
    teachers = []
    for name in names:
        own = [source for source in replicas if _teacher(source.latest) == name]
        past = [report for report in gone if isinstance(report, ReplicaReport) and report.info.name == name]
        fingerprints = tuple(info.fingerprint for info in news.weights.get(name, ()))
        teachers.append(_teacher_status(name, plan.teachers.get(name), fingerprints, own, past, edges, gone, now_s))
    return ServerStatus(
        server_version=__version__,
        up_s=now_s - born_s,
        teachers=tuple(teachers),
        tenants=_tenants(plan.tenants, replicas, edges, gone, now_s),
        store=_store(edges, gone),
        edges=tuple(
            EdgeStatus(edge.node, int(edge.counters.get("open_streams", 0)), int(edge.counters.get("open_requests", 0)))
            for edge in (source.latest for source in edges)
            if isinstance(edge, EdgeReport)
        ),
    )


def as_seen_by(status: ServerStatus, tenant: str, tenants: Mapping[str, TenantConfig]) -> ServerStatus:
    """What a tenant may see: itself, or everybody if it is an operator. The empty name is a server without tokens."""
    if not tenant or tenants.get(tenant, tenants.get(DEFAULT_TENANT, TenantConfig())).operator:
        return status
    return replace(status, tenants=tuple(row for row in status.tenants if row.name == tenant))


def add_up(one: ReplicaReport | EdgeReport, other: ReplicaReport | EdgeReport) -> ReplicaReport | EdgeReport:
    """One report with the totals of two, and the latest trouble."""
    counters = _sum(one.counters, other.counters)
    if isinstance(one, ReplicaReport) and isinstance(other, ReplicaReport):
        return replace(one, counters=counters, trouble=other.trouble or one.trouble)
    return replace(one, counters=counters)


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for key in {*one, *other}:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) or isinstance(b, Mapping):
            total[key] = _sum(a or {}, b or {})
        elif isinstance(a, str) or isinstance(b, str):
            total[key] = b or a or ""
        else:
            total[key] = (a or 0) + (b or 0)
    return total


def _teacher(report: ReplicaReport | EdgeReport) -> str:
    return report.info.name if isinstance(report, ReplicaReport) else ""


def _teacher_status(
    name: str,
    plan: TeacherPlan | None,
    fingerprints: tuple[str, ...],
    replicas: Sequence[Source],
    past: Sequence[ReplicaReport],
    edges: Sequence[Source],
    gone: Sequence[ReplicaReport | EdgeReport],
    now_s: float,
) -> TeacherStatus:
    live = [source.latest.counters for source in replicas]
    ended = [report.counters for report in past]
    totals = {key: int(sum(counters.get(key, 0) for counters in (*live, *ended))) for key in _TEACHER_TOTALS}
    gauges = {key: int(sum(counters.get(key, 0) for counters in live)) for key in _TEACHER_NOW}
    past_edges = [report.counters for report in gone if isinstance(report, EdgeReport)]
    retries = sum(_at(counters, "retries", name) for counters in (*(e.latest.counters for e in edges), *past_edges))
    tokens = room = 0.0
    for source in replicas:
        _, first, last = source.since(now_s - RATE_S)
        tokens += _grown(first, last, "forward_tokens")
        room += _grown(first, last, "forwards") * last.get("max_batch_tokens", 0)
    plan = plan or TeacherPlan("leaving")
    troubles = [trouble for source in replicas if (trouble := getattr(source.latest, "trouble", ""))]
    return TeacherStatus(
        name=name,
        state=plan.state,
        message=plan.message or _of_troubles(troubles, len(replicas), totals["given_up"], past),
        replicas=plan.replicas or len(replicas),
        replicas_wanted=plan.replicas_wanted,
        healthy=len(replicas) - len(troubles),
        fingerprints=fingerprints,
        queued_tokens=int(sum(counters.get("queued_tokens", 0) + _waiting_tokens(counters) for counters in live)),
        queued_requests=int(sum(counters.get("queued_jobs", 0) for counters in live)),
        tokens_per_s=sum(_rate(source, now_s, "forward_tokens") for source in replicas),
        batch_fill=min(1.0, tokens / room) if room else 0.0,
        retries=int(retries),
        latencies=_latencies(name, replicas, edges, now_s),
        **totals,
        **gauges,
    )


def _waiting_tokens(counters: Mapping[str, Any]) -> float:
    return float(counters.get("generate_waiting_tokens", 0))


def _of_troubles(troubles: Sequence[str], replicas: int, given_up: int, past: Sequence[ReplicaReport]) -> str:
    """What is to be said of replicas whose forward passes fail, now or before."""
    if troubles:
        return f"{len(troubles)} of {replicas} replicas can compute nothing and are replaced: {troubles[0]}"
    last = [report.trouble for report in past if report.trouble]
    return f"{given_up} replicas were replaced, the last because: {last[-1]}" if last else ""


def _latencies(
    name: str, replicas: Sequence[Source], edges: Sequence[Source], now_s: float
) -> tuple[LatencyStatus, ...]:
    """Quantiles of the last minute, over replicas (queue, forward, reduce) and edges (first_chunk, whole)."""
    found: dict[str, Counter[str]] = {}
    for source, path in [*((r, ("latency",)) for r in replicas), *((e, ("latency", name)) for e in edges)]:
        _, first, last = source.since(now_s - SHARE_S)
        for stage in _node(last, *path):
            buckets = found.setdefault(stage, Counter())
            for label in _node(last, *path, stage, "buckets"):
                # A source that is younger than the window began at zero, before its first report.
                young = source.past[0][0] > now_s - SHARE_S
                before = 0.0 if young else _at(first, *path, stage, "buckets", label)
                buckets[label] += int(_at(last, *path, stage, "buckets", label) - before)
    return tuple(
        LatencyStatus(
            stage, sum(found[stage].values()), *(quantile_s(found[stage], share) for share in (0.5, 0.9, 0.99))
        )
        for stage in STAGES
        if found.get(stage)
    )


def _node(counters: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    node: Any = counters
    for key in path:
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
    return node if isinstance(node, Mapping) else {}


def _tenants(
    configs: Mapping[str, TenantConfig],
    replicas: Sequence[Source],
    edges: Sequence[Source],
    gone: Sequence[ReplicaReport | EdgeReport],
    now_s: float,
) -> tuple[TenantStatus, ...]:
    served, queued, inflight, refused = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    sent = Counter[str]()
    rates: dict[str, float] = defaultdict(float)
    lately: dict[str, float] = defaultdict(float)
    for source in replicas:
        for name, row in _rows(source.latest.counters):
            served[name] += row.get("served_tokens", 0)
            queued[name] += row.get("queued_tokens", 0)
            refused[name] += row.get("refused", 0)
            rates[name] += _rate(source, now_s, "tenants", name, "served_tokens")
            _, first, last = source.since(now_s - SHARE_S)
            lately[name] += _grown(first, last, "tenants", name, "served_tokens")
    for source in edges:
        for name, row in _rows(source.latest.counters):
            inflight[name] += row.get("inflight_tokens", 0)
            refused[name] += row.get("refused", 0)
            sent[name] += row.get("sent_bytes", 0)
    for report in gone:
        for name, row in _rows(report.counters):
            served[name] += row.get("served_tokens", 0)
            refused[name] += row.get("refused", 0)
            sent[name] += row.get("sent_bytes", 0)
    names = {*served, *queued, *inflight, *refused, *(set(configs) - {DEFAULT_TENANT})}
    total = sum(lately.values())
    return tuple(
        TenantStatus(
            name=name,
            weight=configs.get(name, configs.get(DEFAULT_TENANT, TenantConfig())).weight,
            share=lately[name] / total if total else 0.0,
            tokens_per_s=rates[name],
            served_tokens=int(served[name]),
            queued_tokens=int(queued[name]),
            inflight_tokens=int(inflight[name]),
            refused=int(refused[name]),
            sent_bytes=int(sent[name]),
        )
        for name in sorted(names, key=lambda name: (-lately[name], -served[name], name))
    )


def _store(edges: Sequence[Source], gone: Sequence[ReplicaReport | EdgeReport]) -> StoreStatus:
    live = [source.latest.counters.get("store", {}) for source in edges]
    past = [report.counters.get("store", {}) for report in gone if isinstance(report, EdgeReport)]
    return StoreStatus(
        **{key: int(sum(store.get(key, 0) for store in (*live, *past))) for key in _STORE_TOTALS},
        memory_bytes=int(sum(store.get("memory_bytes", 0) for store in live)),
        disk_bytes=int(max((store.get("disk_bytes") or 0 for store in live), default=0)),  # edges share the folder
        trouble=next((told for store in live if (told := store.get("trouble"))), ""),
    )


def _rows(counters: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return counters.get("tenants", {}).items()


def _at(counters: Mapping[str, Any], *path: str) -> float:
    node: Any = counters
    for key in path:
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
    return float(node) if isinstance(node, int | float) else 0.0


def _grown(first: Mapping[str, Any], last: Mapping[str, Any], *path: str) -> float:
    return max(0.0, _at(last, *path) - _at(first, *path))


def _rate(source: Source, now_s: float, *path: str) -> float:
    took_s, first, last = source.since(now_s - RATE_S)
    return _grown(first, last, *path) / took_s if took_s > 0 else 0.0
