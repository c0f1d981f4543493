"""From a ServerConfig to a running server and back to nothing: the only room that knows every part.

`running(config)` is what `teacher-server up` waits in; leaving it drains the edges and ends every process it started.
While inside, `Server.step` keeps the cluster state's plan and the teachers' deployments as the config wants them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from teacher_server.config.server import ServerConfig
from teacher_server.errors import RayEndedError
from teacher_wire.transport.channel import is_loopback

if TYPE_CHECKING:
    from teacher_server.control.supervisor import Server

_STOP_GRACE_S = 10.0
_DAEMONS = ("gcs_server", "raylet")


@contextlib.contextmanager
def running(config: ServerConfig, say: Callable[[str], None]) -> Iterator[Server]:
    """Everything up; on leaving, drained and gone.

    Args:
        config: what to run.
        say: told each step, for the console.

    Raises:
        ServerConfigError: a teacher cannot be loaded, or the port cannot be opened.
    """
    from teacher_server.control.ray_start import listening, start_ray

    own_cluster = start_ray(config, say)
    import ray
    from ray import serve

    from teacher_server.control.supervisor import Server

    daemons = _daemons() if own_cluster else {}
    server: Server | None = None
    try:
        quiet = logging.getLogger("ray.serve")
        quiet.setLevel(logging.ERROR)  # what matters we say ourselves
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
        quiet.setLevel(logging.ERROR)
        say("loading " + ", ".join(f"{teacher.name} ({_model(teacher.backend)})" for teacher in config.teachers))
        server = Server(config, say, partial(_first_dead, daemons))
        server.start()
        if own_cluster:
            say(_told(listening([psutil.Process(), *psutil.Process().children(recursive=True)]), config))
        yield server
        server.drain()
    except RayEndedError:  # not ours any more, or not there
        server = None
        raise
    finally:
        if own_cluster:
            children = [*daemons, *psutil.Process().children(recursive=True)]
            if _first_dead(daemons):  # Ray would wait for it
                _end(children, grace_s=0)
            else:
                ray.shutdown()
                _end(children)
        else:
            if server is not None:
                with contextlib.suppress(Exception):  # on the way out
                    server.remove()
            ray.shutdown()


def _told(sockets: list[str], config: ServerConfig) -> str:
    """All listening sockets, those that other machines can reach last."""
    here = [address for address in sockets if is_loopback(address) and address != config.edge.address]
    open_ones = [address for address in sockets if not is_loopback(address) and address != config.edge.address]
    text = f"listening: the edge on {config.edge.address}; Ray on " + ", ".join(here)
    if open_ones:
        text += f"; on other interfaces Ray on {', '.join(open_ones)} (Serve binds the ports between its replicas so; they take Ray's token)"
    return text


def _daemons() -> dict[psutil.Process, str]:
    """The processes without which nothing of our own cluster answers, and their names."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() in _DAEMONS:
                found[process] = process.name()
    return found


def _first_dead(daemons: Mapping[psutil.Process, str]) -> str:
    """Name of a process of Ray's that has ended, without which nothing of Ray's answers; empty while all live."""
    for process, name in daemons.items():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                continue
        except psutil.NoSuchProcess:
            pass
        return name
    return ""


def _model(backend: Any) -> str:
    return getattr(backend, "model", backend.kind)


def _end(processes: list[Any], grace_s: float = _STOP_GRACE_S) -> None:
    """Waits for processes we started, then ends those that stay."""
    unique = {process.pid: process for process in processes}.values()
    _, alive = psutil.wait_procs(unique, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
