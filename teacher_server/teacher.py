"""The Serve deployment around one engine: Serve places it, scales it, heals it.

In: ScoreCall through a handle; out: TeacherSignals, or a TeacherWireError.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from teacher_server.config import TeacherConfig
from teacher_server.engine import TeacherEngine
from teacher_wire.generation import GenerateCall, Sample
from teacher_wire.messages import HeadHeader, ScoreCall, TeacherInfo, TeacherSignals


class TeacherReplica:
    """One replica of one teacher."""

    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]  # Serve awaits it
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._engine = TeacherEngine(TeacherConfig.model_validate_json(config_json))
        self._engine.start()

    async def info(self) -> TeacherInfo:
        return self._engine.info

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return await self._engine.score(call)

    async def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        async with contextlib.aclosing(self._engine.generate(call)) as samples:
            async for sample in samples:
                yield sample

    async def head_header(self, fingerprint: str) -> HeadHeader:
        return await self._engine.head_header(fingerprint)

    async def head_bytes(self, fingerprint: str, offset: int, size: int) -> bytes:
        return await self._engine.head_bytes(fingerprint, offset, size)

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        self._engine.check_health()

    async def counters(self) -> dict[str, int]:
        return self._engine.counters()


def build_deployment(config: TeacherConfig) -> Any:
    """The application node of one teacher, with its autoscaling block."""
    scaling = config.autoscaling
    deployment = serve.deployment(
        TeacherReplica,
        name=config.name,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": 8.0,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
        },
        graceful_shutdown_timeout_s=20,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
    )
    return deployment.bind(config.model_dump_json())
