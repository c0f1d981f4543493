"""Teachers and edges as applications of Ray Serve: one application each, so that a change of one touches no other.

In: configs and orders; out: what Serve says about each. It decides nothing; `rollout` does.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
from ray import serve

from teacher_server.config.server import EDGE_NAME, EdgeConfig, ServerConfig, TeacherConfig
from teacher_server.control.rolling_update import Deployed
from teacher_server.edge.deployment import Edge
from teacher_server.errors import ServerConfigError
from teacher_server.replica.deployment import application_of, build_deployment
from teacher_server.telemetry.heartbeat import node_address
from teacher_server.telemetry.records import Plan

EDGE_APPLICATION = "lyceum-edge"
EDGE_CPUS = 0.1
_NODE_SHARE = 0.001  # of a node's own resource: enough to be placed there
_DRAIN_MARGIN_S = 5.0

_STATES = {"DEPLOY_FAILED": "failed", "UNHEALTHY": "unhealthy", "RUNNING": "running"}
_REPLICA_STATES = {
    "RUNNING": "running",
    "PENDING_MIGRATION": "running",
    "STARTING": "starting",
    "UPDATING": "starting",
    "RECOVERING": "starting",
    "STOPPING": "stopping",
}


class ServeCluster:
    """The Serve instance of the joined or started Ray cluster; a `rollout.Cluster`."""

    def deploy(self, config: TeacherConfig, generation: int) -> None:
        node = build_deployment(config, generation, surge=_has_room(config))
        _run(node, application_of(config.name))

    def remove(self, name: str) -> None:
        threading.Thread(target=_delete, args=(application_of(name),), daemon=True).start()

    def look(self) -> dict[str, Deployed]:
        prefix = application_of("")
        return {
            name.removeprefix(prefix): _deployed(application)
            for name, application in serve.status().applications.items()
            if name.startswith(prefix)
        }

    def start_edges(self, config: EdgeConfig, plan: Plan) -> None:
        """Begins to start the edges: one on this node, or `count` on a node each."""
        placed: dict[str, Any] = {"ray_actor_options": {"num_cpus": EDGE_CPUS}}
        if config.count == 1:
            here = f"node:{node_address()}"
            placed["ray_actor_options"]["resources"] = {here: _NODE_SHARE}
        else:
            placed |= {"num_replicas": config.count, "max_replicas_per_node": 1}
        edges = serve.deployment(
            Edge, name=EDGE_NAME, graceful_shutdown_timeout_s=1, graceful_shutdown_wait_loop_s=0.1, **placed
        )
        _run(edges.bind(config.model_dump_json(), plan), EDGE_APPLICATION)

    def edges_exist(self) -> bool:
        """Whether edges are deployed, by us or by a server before."""
        return EDGE_APPLICATION in serve.status().applications

    def remove_edges(self) -> None:
        """Takes the edges away; returns when their ports are free."""
        _delete(EDGE_APPLICATION)

    def edges_are_up(self) -> bool:
        """Whether all edges listen.

        Raises:
            ServerConfigError: one cannot; why.
        """
        application = serve.status().applications.get(EDGE_APPLICATION)
        found = _deployed(application) if application else Deployed("deploying")
        if found.state == "failed":
            raise ServerConfigError(found.why)
        return found.state == "running"

    def drain_edges(self, drain_s: float) -> None:
        """Has every edge refuse new requests and answer the open ones. Raises what Serve raises."""
        handle = serve.get_deployment_handle(EDGE_NAME, EDGE_APPLICATION)
        handle.broadcast("drain").results(timeout_s=drain_s + _DRAIN_MARGIN_S)

    def remove_all(self) -> None:
        """Takes every application of ours away, the edges first."""
        prefix = application_of("")
        names = [name for name in serve.status().applications if name.startswith(prefix)]
        for name in (EDGE_APPLICATION, *names):
            _delete(name)


def check_room(config: ServerConfig) -> None:
    """Refuses what this cluster can never place: Serve would wait for room without a word.

    Raises:
        ServerConfigError: naming what is asked for and what there is.
    """
    there = ray.cluster_resources()
    for resource, field, own in (("CPU", "num_cpus", EDGE_CPUS * config.edge.count), ("GPU", "num_gpus", 0.0)):
        asked = sum(getattr(t, field) * t.autoscaling.min_replicas for t in config.teachers) + own
        if asked > there.get(resource, 0.0) + 1e-9:
            told = ", ".join(f"{t.name} {getattr(t, field):g} x {t.autoscaling.min_replicas}" for t in config.teachers)
            raise ServerConfigError(
                f"teachers.*.{field}: {told} take {asked:g} {resource}s with the edge, "
                f"the cluster has {there.get(resource, 0.0):g}"
            )
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if config.edge.count > nodes:
        raise ServerConfigError(f"edge.count: {config.edge.count} edges need a node each, the cluster has {nodes}")


def metrics_addresses() -> list[str]:
    """Where Prometheus finds the metrics: one address a node."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]


def _has_room(config: TeacherConfig) -> bool:
    """Whether one more replica fits now: then new ones come before old ones go."""
    free = ray.available_resources()
    return free.get("CPU", 0.0) >= config.num_cpus and free.get("GPU", 0.0) >= config.num_gpus


def _run(node: Any, application: str) -> None:
    target = serve.RunTarget(node, name=application, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def _delete(application: str) -> None:
    with contextlib.suppress(Exception):  # it goes on going; `look` tells when it is gone
        serve.delete(application)


def _deployed(application: Any) -> Deployed:
    replicas: dict[str, int] = {}
    for deployment in application.deployments.values():
        for state, count in deployment.replica_states.items():
            name = _REPLICA_STATES.get(state)
            if name:
                replicas[name] = replicas.get(name, 0) + count
    state = _STATES.get(application.status, "deploying")
    why = "" if state == "running" else _why([d.message for d in application.deployments.values()], state)
    return Deployed(state, why or (application.message if state != "running" else ""), replicas)


def _why(messages: list[str], state: str) -> str:
    """The deepest sentence Serve kept about a deployment that does not come up."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        if "ServerConfigError: " in line:
            return line.split("ServerConfigError: ", 1)[1].strip()
    return lines[-1] if lines and state != "deploying" else lines[0] if lines else ""
