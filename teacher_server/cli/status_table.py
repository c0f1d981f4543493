"""A `ServerStatus` as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from teacher_wire.core.status import ServerStatus, StoreStatus, TeacherStatus

_STATE_STYLES = {"running": "green", "rolling": "yellow", "starting": "yellow", "failed": "bold red"}
_FINGERPRINT_CHARS = 8
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def render(status: ServerStatus) -> RenderableType:
    """Teachers, tenants, and a line each about stored labels and edges. Queued, served and in flight are tokens."""
    parts: list[RenderableType] = [_teachers(status)]
    parts += [Text(f"{teacher.name}: {teacher.message}") for teacher in status.teachers if teacher.message]
    parts += [Text(f"{teacher.name}: {line}") for teacher in status.teachers for line in _details(teacher)]
    if status.tenants:
        parts.append(_tenants(status))
    parts += [_store(status.store), _edges(status)]
    return Group(*parts)


def _teachers(status: ServerStatus) -> Table:
    table = _table("teacher", "state", "weights", "replicas", "queued", "tokens/s", "fill", "answered", "failed")
    for teacher in status.teachers:
        table.add_row(
            teacher.name,
            Text(teacher.state, _STATE_STYLES.get(teacher.state, "")),
            " ".join(fingerprint[:_FINGERPRINT_CHARS] for fingerprint in teacher.fingerprints) or "-",
            _replicas(teacher),
            f"{teacher.queued_tokens:,}",
            f"{teacher.tokens_per_s:,.0f}",
            f"{teacher.batch_fill:.0%}",
            f"{teacher.answered:,}",
            f"{teacher.failed:,}",
        )
    return table


def _details(teacher: TeacherStatus) -> list[str]:
    """A line each about writing and about latencies, where there is anything to say."""
    lines = []
    if teacher.generate_calls or teacher.generated_samples:
        lines.append(
            f"writes {teacher.generate_running:,} sequences of {teacher.generate_calls:,} calls, "
            f"{teacher.generate_waiting:,} wait; {teacher.generated_samples:,} samples written"
        )
    if teacher.interactive_answered or teacher.interactive_queued_requests:
        lines.append(
            f"interactive: {teacher.interactive_answered:,} requests answered, {teacher.interactive_tokens:,} tokens in "
            f"{teacher.interactive_forwards:,} forward passes; {teacher.interactive_queued_requests:,} wait"
        )
    if teacher.latencies:
        stages = (f"{entry.stage} {entry.p50_s:.3g}/{entry.p99_s:.3g} s" for entry in teacher.latencies)
        lines.append(f"p50/p99 of the last minute: {', '.join(stages)}")
    return lines


def _replicas(teacher: TeacherStatus) -> str:
    wanted = max(teacher.replicas, teacher.replicas_wanted)
    return f"{teacher.replicas}" if wanted == teacher.replicas else f"{teacher.replicas} of {wanted}"


def _tenants(status: ServerStatus) -> Table:
    table = _table("tenant", "weight", "share", "tokens/s", "served", "queued", "in flight", "refused")
    for tenant in status.tenants:
        table.add_row(
            tenant.name or "(no name)",
            f"{tenant.weight:g}",
            f"{tenant.share:.0%}",
            f"{tenant.tokens_per_s:,.0f}",
            f"{tenant.served_tokens:,}",
            f"{tenant.queued_tokens:,}",
            f"{tenant.inflight_tokens:,}",
            f"{tenant.refused:,}",
        )
    return table


def _store(store: StoreStatus) -> Text:
    text = Text(
        f"labels: {store.memory_hits:,} sequences from memory ({size(store.memory_bytes)}), "
        f"{store.disk_hits:,} from disk ({size(store.disk_bytes)}), {store.joined:,} joined, {store.computed:,} computed"
    )
    if store.unshared:
        text.append(f", {store.unshared:,} computed and not kept, as asked")
    if store.trouble:
        text.append(f"\nlabel store: {store.trouble}", style="red")
    return text


def _edges(status: ServerStatus) -> Text:
    edges = ", ".join(
        f"{edge.node} with {edge.open_streams} streams and {edge.open_requests} open requests" for edge in status.edges
    )
    return Text(
        f"edges: {edges or 'none reports, so quotas do not change and figures are old'}; version {status.server_version}, up {status.up_s:,.0f} s"
    )


def size(count: int) -> str:
    """Bytes for people."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        text = place == 0 or column in ("state", "weights")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table
