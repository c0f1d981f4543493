"""The interactive lane as operators see it: status over the wire, the table, Prometheus."""

import io
from dataclasses import replace

from rich.console import Console

from teacher_server.cli.status_table import render
from teacher_server.config.server import TenantConfig
from teacher_server.telemetry.latency import Latencies
from teacher_server.telemetry.prometheus import _NOW, _TOTALS, _series
from teacher_wire.core.status import StoreStatus, TeacherStatus
from teacher_wire.endpoint.status_codec import decode_status, encode_status
from tests.teacher_server.telemetry.test_cluster_state import edge, replica, state_of

LANE = {
    "interactive_queued_tokens": 70, "interactive_queued_requests": 2, "interactive_forwards": 3, "interactive_tokens": 900,
    "interactive_answered": 4,
}  # fmt: skip


def latency(stage):
    latencies = Latencies()
    latencies.observe(stage, 0.02)
    return latencies.counters()


async def status():
    cluster_state, _ = await state_of(a=TenantConfig())
    made = replica(forwards=9, a=1000)
    lane = {**made.counters, **LANE, "latency": latency("interactive_queue")}
    await cluster_state.report("r1", replace(made, counters=lane))
    seen = edge(unshared=5, computed=7)
    whole = {"latency": {"fake": latency("interactive_whole")}}
    await cluster_state.report("e1", replace(seen, counters={**seen.counters, **whole}))
    return await cluster_state.status()


async def test_status_counts_the_lane_and_survives_the_wire():
    found = await status()
    assert decode_status(encode_status(found)) == found
    (teacher,) = found.teachers
    assert {name: getattr(teacher, name) for name in LANE} == LANE
    assert {entry.stage for entry in teacher.latencies} == {"interactive_queue", "interactive_whole"}
    assert (found.store.unshared, found.store.computed) == (5, 7)


async def test_a_server_that_nobody_asks_interactively_tells_nothing_new():
    found = await status()
    bare = replace(found, teachers=(TeacherStatus("fake", "running"),), store=StoreStatus(computed=7))
    names = {field.name for field, _ in encode_status(bare).teachers[0].ListFields()}
    assert not any(name.startswith("interactive") for name in names)
    assert shown(bare).count("interactive") == 0 and "not kept" not in shown(bare)


async def test_the_table_says_what_the_lane_did():
    text = shown(await status())
    assert "interactive: 4 requests answered, 900 tokens in 3 forward passes; 2 wait" in text
    assert "5 computed and not kept, as asked" in text


def test_every_series_of_the_lane_has_a_text_for_prometheus():
    series = {name: (tags, value) for name, tags, value in _series({**LANE, "store": {"unshared": 5}})}
    assert {name: value for name, (_, value) in series.items() if name in LANE} == LANE
    assert series["store_sequences"] == ({"found": "not_looked_for"}, 5.0)
    assert set(LANE) <= set(_TOTALS) | set(_NOW) and not set(_TOTALS) & set(_NOW)


def shown(found):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(render(found))
    return console.export_text()
