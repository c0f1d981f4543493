"""A server that runs: its deployments, its cluster state, and how both follow a changed config.

In: a ServerConfig, another one later; out: lines for the console. `step` must be called again and again.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayTaskError

from teacher_server import __version__
from teacher_server.config.server import ServerConfig
from teacher_server.control.preflight import check_files
from teacher_server.control.publications import Publications
from teacher_server.control.rolling_update import Rollout, changes
from teacher_server.control.serve_apps import ServeCluster, check_room, metrics_addresses
from teacher_server.edge.auth import TokenFile
from teacher_server.edge.tls import Rotation
from teacher_server.errors import RayEndedError, ServerConfigError, TakenOverError
from teacher_server.telemetry.heartbeat import node_address, remove_cluster_state, start_cluster_state
from teacher_server.telemetry.prometheus import Exported
from teacher_server.telemetry.records import Held, Plan, TeacherPlan

_STEP_S = 1.0
_START_STEP_S = 0.2
_LOOK_S = 0.1
_STATE_S = 2.0
_STATE_START_S = 60.0  # its process has to come up first


class Server:
    """What runs, and how it follows a changed config.

    Args:
        config: in force now.
        say: told each step, for the console.
        dead: name of a process of our own Ray that has ended, or nothing.
    """

    def __init__(self, config: ServerConfig, say: Callable[[str], None], dead: Callable[[], str]) -> None:
        self.config = config
        self._dead = dead
        self._say = say
        self._cluster = ServeCluster()
        self._rollout = Rollout(self._cluster, say)
        self._publications = Publications(self._rollout, say)
        begun = {teacher.name: TeacherPlan() for teacher in config.teachers}
        self._plan = Plan(config.tenants, self._publications.told(config.teachers, begun))
        self._owner = secrets.token_hex(8)
        self._node = node_address()
        try:
            self._cluster_state, self._left = start_cluster_state(self._owner)
        except ValueError as error:
            raise ServerConfigError(
                f"ray.address {config.ray.address}: a teacher-server runs on this cluster already"
            ) from error
        edge = config.edge
        self._tokens = TokenFile(edge.tokens_file) if edge.tokens_file else None
        self._certificates = Rotation(edge.tls, say) if edge.tls else None
        self._exported: dict[str, Exported] = {}
        self._stepped_s = 0.0
        self._trouble = ""

    def start(self) -> None:
        """Returns when every teacher and every edge answers.

        Raises:
            ServerConfigError: one cannot come up; why.
        """
        self._publications.prepare(self.config.teachers)
        adopted = self._adopt()
        if not adopted:
            check_room(self.config)
        self._rollout.want(self._publications.wanted(self.config.teachers))
        self._say("metrics at " + ", ".join(metrics_addresses()))
        if not self._edges_can_stay():
            self._cluster.start_edges(self.config.edge, self._plan)
        while True:
            self._check_ray()
            self._post(self._plan, _STATE_START_S)
            if adopted:  # it serves: a version that cannot come up is taken back, as on a change
                self._plan = self._stepped()
            else:
                self._rollout.start()
            if self._cluster.edges_are_up() and (adopted or self._rollout.settled):
                break
            time.sleep(_START_STEP_S)
        self.step()

    def _adopt(self) -> bool:
        """Takes on what an `up` before left on this cluster; whether there was anything."""
        left = self._left
        same = left is not None and left.version == __version__
        self._rollout.adopt(left.teachers if left is not None and same else {})
        return same and bool(self._rollout.deployed)

    def _edges_can_stay(self) -> bool:
        """Whether edges as this config wants them run here; others are taken away."""
        if not self._cluster.edges_exist():
            return False
        left, edge = self._left, self.config.edge
        if (
            left is not None
            and left.version == __version__
            and left.edge == edge
            and (edge.count > 1 or left.node == self._node)
        ):
            self._say("the edge still runs; adopted")
            return True
        self._say("the edge is started again: it ran otherwise")
        self._cluster.remove_edges()
        return False

    def change(self, config: ServerConfig) -> None:
        """Begins whatever leads to another config.

        Raises:
            ServerConfigError: it cannot be followed; nothing of it is in force.
        """
        changed = changes(self.config.model_dump(), config.model_dump())
        fixed = [name for name in changed if name.split(".")[0] not in ("teachers", "tenants")]
        if fixed:
            raise ServerConfigError(f"{', '.join(fixed)}: takes a restart; nothing of this change is in force")
        try:
            check_files(config)
            check_room(config)
            self._publications.prepare(config.teachers)
        except ServerConfigError as error:
            raise ServerConfigError(f"{error}; the config before stays in force") from None
        tenants = [name for name in changed if name.startswith("tenants.")]
        if tenants:
            self._say(f"{', '.join(tenants)}: in force")
        self.config = config
        self._rollout.want(self._publications.wanted(config.teachers))
        self._stepped_s = 0.0

    def step(self) -> None:
        """Once a second: deployments go on, and the cluster state hears what is wanted. Trouble is said once and passes."""
        now_s = time.monotonic()
        if now_s - self._stepped_s < _STEP_S:
            return
        self._check_ray()
        self._stepped_s = now_s
        try:
            if any(teacher.publish for teacher in self.config.teachers):
                self._rollout.want(self._publications.wanted(self.config.teachers))
            self._plan = self._stepped()
            self._publications.step(self.config.teachers)
            self._post(self._plan)
            for name, teacher in self._plan.teachers.items():
                self._exported.setdefault(name, Exported(teacher=name)).show(vars(teacher))
            trouble = ""
        except RayEndedError:
            raise
        except Exception as error:  # Ray or Serve is recovering; serving goes on without us
            trouble = f"Ray does not answer: {type(error).__name__}: {error}".splitlines()[0]
        if trouble != self._trouble:
            self._say(trouble or "Ray answers again")
            self._trouble = trouble

    def _stepped(self) -> Plan:
        plans = self._publications.told(self.config.teachers, self._rollout.step())
        return Plan(self.config.tenants, plans, open=True)

    def drain(self) -> None:
        """Has the edges answer what they hold, and refuse the rest.

        Raises:
            RayEndedError: nothing can be drained any more.
        """
        self._say("draining")
        done = threading.Event()
        threading.Thread(target=self._drain, args=(done,), daemon=True).start()
        while not done.wait(_LOOK_S):  # a call into a Ray that has ended would wait to its limit
            self._check_ray()

    def _drain(self, done: threading.Event) -> None:
        try:
            self._cluster.drain_edges(self.config.edge.drain_s)
        except Exception as error:  # going down all the same
            if not self._dead():
                self._say(f"the edge could not drain: {type(error).__name__}")
        finally:
            done.set()

    def _look_at_files(self) -> None:
        """Says what the edges, which follow these files too, cannot say on our console."""
        if self._tokens is not None and (why := self._tokens.follow()):
            self._say(f"{why}; the tokens before stay in force")
        if self._certificates is not None:
            self._certificates.changed()

    def _check_ray(self) -> None:
        if dead := self._dead():
            raise RayEndedError(f"Ray's {dead} has ended, and with it what was under way")

    def remove(self) -> None:
        """Takes everything of ours out of a cluster that stays."""
        self._cluster.remove_all()
        remove_cluster_state()

    def _post(self, plan: Plan, timeout_s: float = _STATE_S) -> None:
        held = Held(__version__, self._node, self.config.edge, self._rollout.deployed)
        try:
            ray.get(self._cluster_state.post.remote(plan, self._owner, held), timeout=timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, TakenOverError):
                raise RayEndedError(str(error.cause)) from error
            raise
