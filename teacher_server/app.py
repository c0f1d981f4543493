"""From a ServerConfig to a running server and back to nothing: the only room that knows every part.

`running(config)` is what `teacher-server up` waits in; leaving it drains the edges and ends every process it started.
While inside, `Server.step` keeps the board's plan and the teachers' deployments as the config wants them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from teacher_server.config import ServerConfig
from teacher_server.errors import ServerConfigError

if TYPE_CHECKING:
    from teacher_server.server import Server

_STOP_GRACE_S = 10.0


@contextlib.contextmanager
def running(config: ServerConfig, say: Callable[[str], None]) -> Iterator[Server]:
    """Everything up; on leaving, drained and gone.

    Args:
        config: what to run.
        say: told each step, for the console.

    Raises:
        ServerConfigError: a teacher cannot be loaded, or the port cannot be opened.
    """
    import psutil

    say("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    own_cluster = _start_ray(config)
    import ray
    from ray import serve

    from teacher_server.server import Server

    children = psutil.Process().children(recursive=True) if own_cluster else []
    server: Server | None = None
    try:
        quiet = logging.getLogger("ray.serve")
        quiet.setLevel(logging.ERROR)  # what matters we say ourselves
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
        quiet.setLevel(logging.ERROR)
        say("loading " + ", ".join(f"{teacher.name} ({_model(teacher.backend)})" for teacher in config.teachers))
        server = Server(config, say)
        server.start()
        yield server
        server.drain()
    finally:
        if not own_cluster and server is not None:  # our own cluster goes as a whole
            with contextlib.suppress(Exception):  # on the way out
                server.remove()
        children += psutil.Process().children(recursive=True) if own_cluster else []
        ray.shutdown()
        _end(children)


def _model(backend: Any) -> str:
    return getattr(backend, "model", backend.kind)


def _start_ray(config: ServerConfig) -> bool:
    """Joins or starts a cluster; whether it is our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if config.ray.address is not None:
            try:
                ray.init(address=config.ray.address, **quiet)
            except (ConnectionError, ValueError) as error:
                raise ServerConfigError(f"ray.address {config.ray.address}: {error}") from error
            return False
        from teacher_server.serve_cluster import EDGE_CPUS

        needed = sum(t.num_cpus * t.autoscaling.min_replicas for t in config.teachers) + EDGE_CPUS
        ray.init(  # its ports listen on every interface, and take the token that Ray makes for a cluster of its own
            num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, int(needed) + 1),
            object_store_memory=config.ray.object_store_mb << 20,
            include_dashboard=False,
            **quiet,
        )
        return True
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place, which abort
            signal.signal(number, handler)


def _end(processes: list[Any]) -> None:
    """Waits for processes we started, then ends those that stay."""
    import psutil

    unique = {process.pid: process for process in processes}.values()
    _, alive = psutil.wait_procs(unique, timeout=_STOP_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
