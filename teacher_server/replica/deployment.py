"""The Serve deployment around one engine: Serve places it, scales it, heals it, replaces it by newer weights.

In: ScoreCall through a handle; out: TeacherSignals, or a TeacherWireError. Reports to the cluster state once a second.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from teacher_server.config.server import TeacherConfig
from teacher_server.replica.autoscaling import QUEUED_TOKENS, QueuedTokensPolicy
from teacher_server.replica.engine import TeacherEngine
from teacher_server.telemetry.heartbeat import Reporter
from teacher_server.telemetry.prometheus import Exported
from teacher_server.telemetry.records import News, ReplicaReport
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow

_DRAIN_S = 300.0  # what a full queue may take; requests of a replica that needs longer go to another one
_START_TRIES = 3  # replicas of a version that may fail before it is given up
_SURGE_PERCENT = 25  # replicas that a rolling update starts before it stops old ones
# Serve's own is 10 s, longer than a student should wait for the next replica; it can only be set for the process.
_SCALING_ENV = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
_HEALTH_CHECK_S = 1.0  # Serve replaces a replica after three that failed
_LOOK_BACK_S = 11.0  # Serve records a point every fifth of it, and wants more than 10


class TeacherReplica:
    """One replica of one teacher."""

    _reporter: Reporter | None = None

    async def __init__(self, config_json: str, generation: int) -> None:  # type: ignore[misc]  # Serve awaits it
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._generation = generation
        config = TeacherConfig.model_validate_json(config_json)
        replica = serve.get_replica_context().replica_id.unique_id
        self._exported = Exported(teacher=config.name, replica=replica)
        self._engine = TeacherEngine(config, on_observe=self._exported.observe)
        self._engine.start()
        await self.holding(self._engine.info.fingerprint)
        self._reporter = Reporter(replica, self._report, self._take)
        await self._reporter.report()  # whoever asks next hears of these weights
        self._reporter.start()

    @serve.multiplexed(max_num_models_per_replica=1)
    async def holding(self, fingerprint: str) -> str:
        """Tells Serve's router which weights are here, for requests that ask for them."""
        return fingerprint

    async def info(self) -> TeacherInfo:
        return self._engine.info

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return await self._engine.score(call)

    async def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        async with contextlib.aclosing(self._engine.generate(call)) as samples:
            async for sample in samples:
                yield sample

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        return await self._engine.artifact_header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return await self._engine.artifact_bytes(call, offset, size)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        return await self._engine.reader.tokenize(call)

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve; see `scaling`."""
        counters = self._engine.counters()
        return {QUEUED_TOKENS: float(counters["queued_tokens"] + counters.get("generate_waiting_tokens", 0))}

    def _report(self) -> ReplicaReport:
        counters, trouble = self._engine.counters(), self._engine.trouble
        self._exported.show({**counters, "healthy": int(not trouble)})
        return ReplicaReport(self._generation, self._engine.info, counters, trouble)

    def _take(self, news: News) -> None:
        if news.plan is not None:
            self._engine.set_weights({name: tenant.weight for name, tenant in news.plan.tenants.items()})

    def __del__(self) -> None:
        """Called by Serve when the replica has answered all it held."""
        if self._reporter is not None:
            self._reporter.leave()


def application_of(teacher: str) -> str:
    """The Serve application of a teacher: one each, so that a change of one touches no other."""
    return f"lyceum-teacher-{teacher}"


def build_deployment(config: TeacherConfig, generation: int = 0, *, surge: bool = False) -> Any:
    """The application of one teacher.

    Args:
        config: of this teacher.
        generation: rises with every deployment of it.
        surge: a rolling update starts new replicas before it stops old ones; takes room for one more.
    """
    scaling = config.autoscaling
    deployment = serve.deployment(
        TeacherReplica,
        name=config.name,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "runtime_env": {"env_vars": _SCALING_ENV},
        },
        max_ongoing_requests=config.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": _LOOK_BACK_S,
            "policy": {
                "policy_function": f"{QueuedTokensPolicy.__module__}:{QueuedTokensPolicy.__name__}",
                "policy_kwargs": {"target_queued_tokens": scaling.target_queued_tokens},
            },
        },
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_CHECK_S,
        max_constructor_retry_count=_START_TRIES,
        max_surge_percent=_SURGE_PERCENT if surge else 0,
    )
    return deployment.bind(config.model_dump_json(), generation)
