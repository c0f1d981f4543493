"""From a ServerConfig to a running server and back to nothing: the only room that knows every part.

`running(config)` is what `teacher-server up` waits in; leaving it drains the edges and ends every process it started.
While inside, `Server.step` keeps the board's plan and the teachers' deployments as the config wants them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from teacher_server.backends.model_folder import check_local
from teacher_server.config import ServerConfig, TransformersBackend
from teacher_server.edge.auth import TokenFile
from teacher_server.errors import ServerConfigError
from teacher_server.reports import Plan, TeacherPlan
from teacher_server.rollout import Rollout, changes

_STOP_GRACE_S = 10.0
_STEP_S = 1.0
_START_STEP_S = 0.2
_BOARD_S = 2.0


def check(config: ServerConfig) -> None:
    """Refuses what is bound to fail, before a process is started.

    Raises:
        ServerConfigError: a folder, file or port that cannot work, by name.
    """
    check_files(config)
    edge = config.edge
    if edge.count > 1 and edge.host not in ("0.0.0.0", "::", "127.0.0.1", "::1", "localhost"):
        raise ServerConfigError(
            f"edge.host {edge.host}: {edge.count} edges listen on a node each, which needs a host that every node has: 0.0.0.0 or ::"
        )
    with socket.socket(socket.AF_INET6 if ":" in edge.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((edge.host, edge.port))
        except OSError as error:
            raise ServerConfigError(f"edge.port: cannot listen on {edge.address}: {error.strerror}") from error


def check_files(config: ServerConfig) -> None:
    """Refuses files and folders that are not what they should be.

    Raises:
        ServerConfigError: naming the setting.
    """
    for teacher in config.teachers:
        if isinstance(teacher.backend, TransformersBackend):
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


class Server:
    """What runs, and how it follows a changed config.

    Args:
        config: in force now.
        say: told each step, for the console.
    """

    def __init__(self, config: ServerConfig, say: Callable[[str], None]) -> None:
        from teacher_server.reporting import start_board
        from teacher_server.serve_cluster import ServeCluster

        self.config = config
        self._say = say
        self._cluster = ServeCluster()
        self._rollout = Rollout(self._cluster, say)
        self._plan = Plan(config.tenants, {teacher.name: TeacherPlan() for teacher in config.teachers})
        try:
            self._board = start_board()
        except ValueError as error:
            raise ServerConfigError(
                f"ray.address {config.ray.address}: a teacher-server runs on this cluster already"
            ) from error
        self._stepped_s = 0.0
        self._trouble = ""

    def start(self) -> None:
        """Returns when every teacher and every edge answers.

        Raises:
            ServerConfigError: one cannot come up; why.
        """
        from teacher_server.serve_cluster import check_room

        check_room(self.config)
        self._rollout.want(self.config.teachers)
        self._cluster.start_edges(self.config.edge, self._plan)
        while True:
            self._post(self._plan)
            self._rollout.start()
            if self._cluster.edges_are_up() and self._rollout.settled:
                break
            time.sleep(_START_STEP_S)
        self.step()

    def change(self, config: ServerConfig) -> None:
        """Begins whatever leads to another config.

        Raises:
            ServerConfigError: it cannot be followed; nothing of it is in force.
        """
        from teacher_server.serve_cluster import check_room

        changed = changes(self.config.model_dump(), config.model_dump())
        fixed = [name for name in changed if name.split(".")[0] not in ("teachers", "tenants")]
        if fixed:
            raise ServerConfigError(f"{', '.join(fixed)}: takes a restart; nothing of this change is in force")
        try:
            check_files(config)
            check_room(config)
        except ServerConfigError as error:
            raise ServerConfigError(f"{error}; the config before stays in force") from None
        tenants = [name for name in changed if name.startswith("tenants.")]
        if tenants:
            self._say(f"{', '.join(tenants)}: in force")
        self.config = config
        self._rollout.want(config.teachers)
        self._stepped_s = 0.0

    def step(self) -> None:
        """Once a second: deployments go on, and the board hears what is wanted. Trouble is said once and passes."""
        now_s = time.monotonic()
        if now_s - self._stepped_s < _STEP_S:
            return
        self._stepped_s = now_s
        try:
            self._plan = Plan(self.config.tenants, self._rollout.step(), open=True)
            self._post(self._plan)
            trouble = ""
        except Exception as error:  # Ray or Serve is recovering; serving goes on without us
            trouble = f"Ray does not answer: {type(error).__name__}: {error}".splitlines()[0]
        if trouble != self._trouble:
            self._say(trouble or "Ray answers again")
            self._trouble = trouble

    def drain(self) -> None:
        """Has the edges answer what they hold, and refuse the rest."""
        self._say("draining")
        try:
            self._cluster.drain_edges(self.config.edge.drain_s)
        except Exception as error:  # going down all the same
            self._say(f"the edge could not drain: {type(error).__name__}")

    def remove(self) -> None:
        """Takes everything of ours out of a cluster that stays."""
        self._cluster.remove_all()

    def _post(self, plan: Plan) -> None:
        import ray

        ray.get(self._board.post.remote(plan), timeout=_BOARD_S)


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
    import ray
    from ray import serve

    say("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    own_cluster = _start_ray(config)
    children = psutil.Process().children(recursive=True) if own_cluster else []
    server: Server | None = None
    try:
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what matters we say ourselves
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
        ray.init(
            num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, int(needed) + 1),
            object_store_memory=config.ray.object_store_mb << 20,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",  # nothing of Ray's is reachable from outside
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
