"""From a ServerConfig to a running Serve application and back to nothing: the only room that knows every part.

`running(config)` is what `teacher-server up` waits in; leaving it drains the edge and ends every process it started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from teacher_server.backends.model_folder import check_local
from teacher_server.config import EDGE_NAME, ServerConfig, TransformersBackend, VllmBackend
from teacher_server.edge.auth import TokenFile
from teacher_server.errors import ServerConfigError

APPLICATION = "lyceum"
_EDGE_CPUS = 0.1
_STOP_GRACE_S = 10.0


def check(config: ServerConfig) -> None:
    """Refuses what is bound to fail, before a process is started.

    Raises:
        ServerConfigError: a folder, file or port that cannot work, by name.
    """
    for teacher in config.teachers:
        if isinstance(teacher.backend, TransformersBackend | VllmBackend):
            try:
                check_local(teacher.backend.model)
            except ServerConfigError as error:
                raise ServerConfigError(f"teachers.{teacher.name}.backend.model: {error}") from None
    edge = config.edge
    if edge.tokens_file:
        TokenFile(edge.tokens_file)
    for field, file in vars(edge.tls).items() if edge.tls else ():
        if file is not None and not file.is_file():
            raise ServerConfigError(f"edge.tls.{field} {file}: no such file")
    with socket.socket(socket.AF_INET6 if ":" in edge.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((edge.host, edge.port))
        except OSError as error:
            raise ServerConfigError(f"edge.port: cannot listen on {edge.address}: {error.strerror}") from error


@contextlib.contextmanager
def running(config: ServerConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Everything up; on leaving, drained and gone.

    Args:
        config: what to run.
        say: told each step, for the console.

    Raises:
        ServerConfigError: a teacher cannot be loaded, or the port cannot be opened.
    """
    import psutil
    import ray
    from ray import serve

    say("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    own_cluster = _start_ray(config)
    children = psutil.Process().children(recursive=True) if own_cluster else []
    try:
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
        _check_room(config, ray.cluster_resources())
        say("loading " + ", ".join(f"{teacher.name} ({_model(teacher.backend)})" for teacher in config.teachers))
        _deploy(config)
        children += psutil.Process().children(recursive=True) if own_cluster else []
        yield
        say("draining")
        try:
            serve.get_deployment_handle(EDGE_NAME, APPLICATION).drain.remote().result(timeout_s=config.edge.drain_s + 5)
        except Exception as error:  # going down all the same
            say(f"the edge could not drain: {type(error).__name__}")
    finally:
        with contextlib.suppress(Exception):  # on the way out; what is left is ended below
            serve.delete(APPLICATION)  # of our own cluster the rest goes with it
        children += psutil.Process().children(recursive=True) if own_cluster else []
        ray.shutdown()
        _end(children)


def _check_room(config: ServerConfig, cluster: dict[str, float]) -> None:
    """Refuses teachers that this cluster can never place: Serve would wait for room without a word.

    Raises:
        ServerConfigError: naming what is asked for and what there is.
    """
    for resource, field, own in (("CPU", "num_cpus", _EDGE_CPUS), ("GPU", "num_gpus", 0.0)):
        asked = sum(getattr(t, field) * t.autoscaling.min_replicas for t in config.teachers) + own
        there = cluster.get(resource, 0.0)
        if asked > there + 1e-9:
            told = ", ".join(f"{t.name} {getattr(t, field):g} x {t.autoscaling.min_replicas}" for t in config.teachers)
            raise ServerConfigError(
                f"teachers.*.{field}: {told} take {asked:g} {resource}s with the edge, the cluster has {there:g}"
            )


def _model(backend: Any) -> str:
    return getattr(backend, "model", backend.kind)


def _start_ray(config: ServerConfig) -> bool:
    """Joins or starts a cluster; whether it is our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.ray.address is not None:
        try:
            ray.init(address=config.ray.address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ServerConfigError(f"ray.address {config.ray.address}: {error}") from error
        return False
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    needed = sum(t.num_cpus * t.autoscaling.min_replicas for t in config.teachers) + _EDGE_CPUS
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, int(needed) + 1),
        object_store_memory=config.ray.object_store_mb << 20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",  # nothing of Ray's is reachable from outside
        **quiet,
    )
    for number, handler in handlers.items():  # Ray puts its own in their place, which abort
        signal.signal(number, handler)
    return True


def _deploy(config: ServerConfig) -> None:
    from ray import serve

    from teacher_server.edge.deployment import Edge
    from teacher_server.teacher import build_deployment

    teachers = [build_deployment(teacher) for teacher in config.teachers]
    names = [teacher.name for teacher in config.teachers]
    edge = serve.deployment(
        Edge,
        name=EDGE_NAME,
        ray_actor_options={"num_cpus": _EDGE_CPUS},
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
    ).bind(config.edge.model_dump_json(), names, *teachers)
    try:
        serve.run(edge, name=APPLICATION, route_prefix=None)
    except RuntimeError as error:
        raise ServerConfigError(_why_not_up(str(error))) from error


def _why_not_up(fallback: str) -> str:
    """The deepest sentence Serve kept about a deployment that failed to start."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in application.deployments.values()] if application else []
    for message in messages:
        for line in reversed(message.splitlines()):
            if "ServerConfigError: " in line:
                return line.split("ServerConfigError: ", 1)[1].strip()
    last = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return last[-1] if last else fallback


def _end(processes: list[Any]) -> None:
    """Waits for processes we started, then ends those that stay."""
    import psutil

    unique = {process.pid: process for process in processes}.values()
    _, alive = psutil.wait_procs(unique, timeout=_STOP_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
