"""The cluster state: what is fresh, what is summed, what each reporter hears; and a status that adds up."""

import asyncio
import io
import types
from dataclasses import replace

import pytest
from rich.console import Console

from teacher_server.cli.status_table import render
from teacher_server.config.server import EdgeConfig, TenantConfig
from teacher_server.errors import TakenOverError
from teacher_server.telemetry import heartbeat
from teacher_server.telemetry.cluster_state import FRESH_S, ClusterState
from teacher_server.telemetry.latency import Latencies, quantile_s
from teacher_server.telemetry.records import EdgeReport, Held, Plan, ReplicaReport, TeacherPlan
from teacher_server.telemetry.summary import as_seen_by
from teacher_wire.core.status import LatencyStatus, ServerStatus, TeacherStatus, TenantStatus
from teacher_wire.endpoint import status_codec
from teacher_wire.testing.fake_teacher import FakeTeacher

OLD, NEW = FakeTeacher(seed=0).teacher_info(), FakeTeacher(seed=1).teacher_info()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def replica(info=OLD, generation=1, forwards=0, **tenants):
    """A replica that has served `tenants`' tokens in forward passes of 100."""
    served = sum(tenants.values())
    return ReplicaReport(
        generation,
        info,
        {
            "queued_tokens": 7, "queued_jobs": 2, "forwards": forwards, "forward_tokens": served, "max_batch_tokens": 100,
            "answered": served // 10, "failed": 1,
            "tenants": {name: {"queued_tokens": 3, "served_tokens": tokens} for name, tokens in tenants.items()},
        },
    )  # fmt: skip


def edge(**store):
    tenants = {"a": {"inflight_tokens": 5, "refused": 2}}
    return EdgeReport("10.0.0.1", {"open_streams": 1, "open_requests": 4, "store": store, "tenants": tenants})


async def state_of(**tenants):
    clock = Clock()
    cluster_state = ClusterState(clock)
    await cluster_state.post(Plan(tenants, {"fake": TeacherPlan("running", "", 2, 2)}, open=True))
    return cluster_state, clock


async def test_sums_rates_and_shares_are_those_of_the_reports():
    cluster_state, clock = await state_of(a=TenantConfig(weight=3), b=TenantConfig())
    for second in range(11):
        await cluster_state.report("r1", replica(forwards=2 * second, a=120 * second, b=40 * second))
        await cluster_state.report("r2", replica(forwards=second, a=30 * second))
        await cluster_state.report("e1", edge(memory_hits=second, memory_bytes=100, disk_bytes=70))
        await cluster_state.report("e2", edge(memory_hits=1, memory_bytes=50, disk_bytes=70))
        clock.now_s += 1
    status = await cluster_state.status()
    (teacher,) = status.teachers
    assert (teacher.replicas, teacher.queued_tokens, teacher.queued_requests) == (2, 14, 4)
    assert teacher.tokens_per_s == pytest.approx(190, rel=0.11)
    assert teacher.batch_fill == pytest.approx(190 / 300)
    assert (teacher.forwards, teacher.forward_tokens, teacher.answered, teacher.failed) == (30, 1900, 190, 2)
    a, b = status.tenants
    assert (a.name, a.weight, a.served_tokens, a.queued_tokens, a.inflight_tokens, a.refused) == (
        "a",
        3,
        1500,
        6,
        10,
        4,
    )
    assert (a.share, b.share) == (pytest.approx(150 / 190), pytest.approx(40 / 190))
    assert (status.store.memory_hits, status.store.memory_bytes, status.store.disk_bytes) == (11, 150, 70)
    assert [e.open_requests for e in status.edges] == [4, 4]
    assert status_codec.decode_status(status_codec.encode_status(status)) == status


async def test_totals_outlive_a_replica_and_are_counted_once_if_it_comes_back():
    cluster_state, clock = await state_of()
    await cluster_state.report("r1", replica(a=100))
    await cluster_state.report("r2", replica(a=50))
    await cluster_state.leave("r2")
    assert (await cluster_state.status()).teachers[0].forward_tokens == 150
    assert len((await cluster_state.report("r1", replica(a=100))).weights["fake"]) == 1
    clock.now_s += FRESH_S + 1
    status = await cluster_state.status()
    assert status.teachers[0].forward_tokens == 150 and status.teachers[0].queued_tokens == 0
    await cluster_state.report("r1", replica(a=130))  # it had only been silent
    status = await cluster_state.status()
    assert status.teachers[0].forward_tokens == 180
    assert status.tenants[0].served_tokens == 180
    clock.now_s += 10_000
    await cluster_state.report("r3", replica(a=1))
    assert (await cluster_state.status()).teachers[0].forward_tokens == 181, "buried, not lost"


async def test_reporters_hear_the_plan_the_live_weights_newest_first_and_the_live_edges():
    cluster_state, clock = await state_of(a=TenantConfig())
    await cluster_state.report("old", replica(OLD, 1))
    await cluster_state.report("new", replica(NEW, 2))
    await cluster_state.report("e1", edge())
    news = await cluster_state.report("e2", edge())
    assert news.plan is not None and set(news.plan.tenants) == {"a"}
    assert [info.fingerprint for info in news.weights["fake"]] == [NEW.fingerprint, OLD.fingerprint]
    assert news.edges == 2
    clock.now_s += FRESH_S + 1
    news = await cluster_state.report("new", replica(NEW, 2))
    assert [info.fingerprint for info in news.weights["fake"]] == [NEW.fingerprint]
    assert news.edges == 1, "at least the one that will come"


async def test_a_new_board_has_no_plan_until_it_is_told():
    assert (await ClusterState(Clock()).report("r1", replica())).plan is None


def test_a_tenant_sees_itself_and_an_operator_everybody():
    from teacher_wire.core.status import ServerStatus

    status = ServerStatus(tenants=(TenantStatus("a"), TenantStatus("b")))
    tenants = {"a": TenantConfig(), "boss": TenantConfig(operator=True)}
    assert as_seen_by(status, "", tenants) == status, "no tokens, no secrets"
    assert as_seen_by(status, "boss", tenants) == status
    assert as_seen_by(status, "a", tenants) == replace(status, tenants=(TenantStatus("a"),))
    assert as_seen_by(status, "unlisted", tenants).tenants == ()


async def test_an_up_that_takes_over_hears_what_the_one_before_had_and_shuts_it_out():
    cluster_state = ClusterState(Clock())
    await cluster_state.claim("one")
    held = Held("0", "10.0.0.1", EdgeConfig(), {})
    await cluster_state.post(Plan(), "one", held)
    assert await cluster_state.posts() == 1
    assert await cluster_state.claim("two") == held
    with pytest.raises(TakenOverError):
        await cluster_state.post(Plan(), "one", held)
    await cluster_state.post(Plan(), "two", held)
    assert await cluster_state.posts() == 2


async def test_tenants_that_are_gone_leave_no_rows_behind():
    """Each replica that goes for good has served a tenant of its own that has no entry and does not come back."""
    cluster_state, clock = await state_of(listed=TenantConfig())
    for number in range(50):
        await cluster_state.report(f"r{number}", replica(**{f"guest-{number}": 10, "listed": 10}))
        clock.now_s += 700
    await cluster_state.report("last", replica(present=10))
    names = {row.name for row in (await cluster_state.status()).tenants}
    assert {"listed", "present"} <= names and len(names) <= 4
    assert next(row for row in (await cluster_state.status()).tenants if row.name == "listed").served_tokens == 500


async def test_a_replica_whose_forward_passes_fail_is_told_and_remembered_once_replaced():
    cluster_state, clock = await state_of()
    sick = replace(replica(forwards=3, a=10), trouble="forward passes fail: CUDA error: illegal address")
    sick = replace(sick, counters={**sick.counters, "failed_forwards": 2, "given_up": 1})
    await cluster_state.report("r1", sick)
    news = await cluster_state.report("r2", replica(forwards=3, a=10))
    assert news.healthy == {"fake": 1}
    (teacher,) = (await cluster_state.status()).teachers
    assert (teacher.healthy, teacher.failed_forwards, teacher.given_up) == (1, 2, 1)
    assert teacher.message.startswith("1 of 2 replicas can compute nothing") and "illegal address" in teacher.message
    clock.now_s += FRESH_S + 1
    news = await cluster_state.report("r2", replica(forwards=4, a=20))
    (teacher,) = (await cluster_state.status()).teachers
    assert (teacher.healthy, teacher.given_up) == (1, 1) and news.healthy == {"fake": 1}
    assert teacher.message.startswith("1 replicas were replaced") and "illegal address" in teacher.message
    clock.now_s += FRESH_S + 1
    assert (await cluster_state.report("e1", edge())).healthy == {}, "nobody is left"


async def test_writing_retries_and_latencies_are_summed_over_replicas_and_edges():
    cluster_state, clock = await state_of()
    latencies, slow = Latencies(), Latencies()
    writing = {"generate_calls": 2, "generate_running": 3, "generate_waiting": 4, "generate_waiting_tokens": 500,
               "generated_samples": 6, "generated_tokens": 70, "refused": 1}  # fmt: skip
    for second in range(3):
        latencies.observe("queue", 0.02)
        slow.observe("whole", 4.0)
        for name in ("r1", "r2"):
            counters = {**replica().counters, **writing, "latency": latencies.counters()}
            await cluster_state.report(name, replace(replica(), counters=counters))
        own = {**edge().counters, "retries": {"fake": 2 + second, "other": 9}, "latency": {"fake": slow.counters()}}
        await cluster_state.report("e1", replace(edge(), counters=own))
        clock.now_s += 1
    status = await cluster_state.status()
    (teacher,) = status.teachers
    assert (teacher.generate_calls, teacher.generate_running, teacher.generate_waiting) == (4, 6, 8)
    assert (teacher.generated_samples, teacher.generated_tokens, teacher.refused, teacher.retries) == (12, 140, 2, 4)
    assert teacher.queued_tokens == 2 * (7 + 500)
    queue, whole = teacher.latencies
    assert (queue.stage, queue.count, whole.stage, whole.count) == ("queue", 6, "whole", 3)
    assert 0.01 < queue.p50_s <= 0.025 < queue.p99_s + 0.001 and 2.5 < whole.p50_s <= 5
    assert status_codec.decode_status(status_codec.encode_status(status)) == status


def test_quantiles_lie_in_the_bucket_that_holds_them():
    latencies = Latencies()
    for milliseconds in range(1, 101):
        latencies.observe("queue", milliseconds / 1e3)
    buckets = latencies.counters()["queue"]["buckets"]
    assert quantile_s(buckets, 0.5) == pytest.approx(0.05, rel=0.02)
    assert quantile_s(buckets, 0.9) == pytest.approx(0.09, rel=0.15)
    assert quantile_s({}, 0.5) == 0 and quantile_s({"inf": 3}, 0.5) == 300


async def test_one_exception_does_not_end_a_reporters_reports(monkeypatch):
    monkeypatch.setattr(heartbeat, "REPORT_EVERY_S", 0.001)
    cluster_state, made, heard = ClusterState(), [], []

    class Actor:
        @property
        def report(self):
            return types.SimpleNamespace(remote=cluster_state.report)

    def make():
        made.append(1)
        if len(made) < 3:
            raise KeyError("a counter that is not there")
        return replica()

    def take(news):
        heard.append(news)
        if len(heard) < 3:
            raise ZeroDivisionError

    reporter = heartbeat.Reporter("r1", make, take)
    reporter._cluster_state = Actor()
    reporter.start()
    async with asyncio.timeout(10):
        while len(heard) < 5:
            await asyncio.sleep(0.002)
    reporter._cluster_state = None
    reporter.leave()


def test_the_console_shows_writing_and_latencies_of_those_that_have_any():
    busy = TeacherStatus("busy", "running", generate_calls=2, generate_running=3, generate_waiting=4, generated_samples=5,
                         latencies=(LatencyStatus("queue", 9, 0.02, 0.03, 0.04),))  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    console.print(render(ServerStatus(teachers=(busy, TeacherStatus("idle", "running")))))
    shown = console.file.getvalue()
    assert "busy: writes 3 sequences of 2 calls, 4 wait; 5 samples written" in shown
    assert "queue 0.02/0.04 s" in shown and "idle:" not in shown


async def test_a_label_store_that_cannot_be_written_is_shown_also_once_its_edge_is_gone():
    cluster_state, clock = await state_of()
    await cluster_state.report("e1", edge(disk_hits=1, trouble="/labels: No space left on device; no more are kept"))
    await cluster_state.report("e2", edge(disk_hits=2, trouble=""))
    status = await cluster_state.status()
    assert status.store.disk_hits == 3 and "No space left" in status.store.trouble
    assert status_codec.decode_status(status_codec.encode_status(status)).store == status.store
    console = Console(file=io.StringIO(), width=200)
    console.print(render(status))
    assert "label store: /labels: No space left" in console.file.getvalue()
    clock.now_s += FRESH_S + 1
    await cluster_state.report("e2", edge(disk_hits=2, trouble=""))
    clock.now_s += FRESH_S + 1
    assert (await cluster_state.status()).store.disk_hits == 3
