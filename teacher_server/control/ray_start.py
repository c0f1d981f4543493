"""From `ray.*` of a config to a Ray that answers: a cluster of our own, or one that is joined.

In: a ServerConfig; out: a connected driver, or one line that says what this machine or that cluster refuses. Whatever Ray finds
in its own environment variables, the config decides which cluster it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from teacher_server.config.server import ServerConfig
from teacher_server.control.guard import STOP_SIGNALS
from teacher_server.errors import ServerConfigError

CONNECT_S = 5.0  # for the first packet of a cluster's head
JOIN_S = 25.0  # for Ray to join it
_TEXT_CHARS = 300
# What would replace our own cluster, or what its config says, by something else.
_OVERRULED = ("RAY_ADDRESS", "RAY_OVERRIDE_RESOURCES", "RAY_JOB_CONFIG_JSON_ENV_VAR")
# Ray's switch for a cluster of one node, whose servers bind 127.0.0.1 (`listen_to_localhost_only`); on every system, despite its name.
_ONE_NODE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


def start_ray(config: ServerConfig, say: Callable[[str], None]) -> bool:
    """Joins or starts a cluster; whether it is our own.

    Raises:
        ServerConfigError: the machine or the cluster refuses; why.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        if config.ray.own:
            _start(config, say)
        else:
            _join(str(config.ray.address), say)
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place, which abort
            signal.signal(number, handler)
        sys.excepthook = sys.__excepthook__  # Ray's tells the cluster of an error first, and waits where that is dead
    return config.ray.own


def _start(config: ServerConfig, say: Callable[[str], None]) -> None:
    say("starting Ray")
    for name in _OVERRULED:
        if os.environ.pop(name, None) is not None:
            say(f"{name} is not used: ray.address is not set, so this is a cluster of our own, as the config says")
    if config.ray.listen == "loopback":
        os.environ[_ONE_NODE] = "0"
    import ray

    from teacher_server.control.serve_apps import EDGE_CPUS

    needed = sum(t.num_cpus * t.autoscaling.min_replicas for t in config.teachers) + EDGE_CPUS
    try:
        ray.init(  # it takes the token that Ray makes for a cluster of its own
            address="local",
            num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, int(needed) + 1),
            object_store_memory=config.ray.object_store_mb << 20,
            include_dashboard=False,
            _metrics_export_port=config.ray.metrics_port,
            **_QUIET,
        )
    except Exception as error:  # whatever the machine refuses
        raise ServerConfigError(f"Ray cannot start on this machine: {one_line(error)}") from error


def _join(address: str, say: Callable[[str], None]) -> None:
    say(f"joining Ray at {address}")
    if address != "auto":
        check_head(address, say)
    import ray

    with _deadline(JOIN_S, f"ray.address {address}: Ray did not join this cluster within {JOIN_S:.0f} s"):
        try:
            ray.init(address=address, **_QUIET)
        except Exception as error:  # a version, a dead raylet, an address of something else
            raise ServerConfigError(f"ray.address {address}: {one_line(error)}") from error


def check_head(address: str, say: Callable[[str], None]) -> None:
    """Refuses an address at which no head of a Ray cluster answers, or none that takes our token, in seconds.

    A cluster that wants a token gets the one of this machine, as `ray start` would give it.

    Raises:
        ServerConfigError: naming the address and what is there.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ServerConfigError(
            f"ray.address {address}: nobody listens there ({why}); is `ray start --head` running?"
        ) from error
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    source, token = _our_token()
    answer = _ask_head(address, "")
    if answer == "UNAUTHENTICATED":
        if mode not in ("", "token"):
            raise ServerConfigError(
                f"ray.address {address}: this cluster takes a token, but here RAY_AUTH_MODE={mode}: set it to token"
            )
        if not token:
            raise ServerConfigError(
                f"ray.address {address}: this cluster takes a token, and there is none here: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
                "or ~/.ray/auth_token as on its head"
            )
        answer = _ask_head(address, token)
        if answer == "UNAUTHENTICATED":
            raise ServerConfigError(f"ray.address {address}: this cluster takes a token, and not the one in {source}")
        if not mode:
            say(f"this cluster takes a token: the one in {source} is used (RAY_AUTH_MODE=token)")
            os.environ["RAY_AUTH_MODE"] = "token"
    if answer != "OK":
        raise ServerConfigError(
            f"ray.address {address}: somebody listens there, but not the head of a Ray cluster (it says {answer})"
        )


def _ask_head(address: str, token: str) -> str:
    """The gRPC code with which a cluster's head, or whoever is there, answers the first question that Ray asks it."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        try:
            channel.unary_unary(_CLUSTER_ID)(b"", timeout=CONNECT_S, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _our_token() -> tuple[str, str]:
    """Where Ray finds its token in this process, and the token; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return "RAY_AUTH_TOKEN", token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path, Path(path).expanduser().read_text().strip()
    return path, ""


def listening(processes: list[psutil.Process]) -> list[str]:
    """HOST:PORT of every TCP socket that these processes listen on."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    host = connection.laddr.ip.removeprefix("::ffff:")  # IPv4, on a socket that could do both
                    found.add((f"[{host}]" if ":" in host else host, connection.laddr.port))
    return [f"{host}:{port}" for host, port in sorted(found)]


def one_line(error: BaseException) -> str:
    """An error of Ray's in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _TEXT_CHARS else f"{text[:_TEXT_CHARS]}..."


@contextlib.contextmanager
def _deadline(limit_s: float, text: str) -> Iterator[None]:
    """Ends the process with one line and exit code 2 if the block, in which Ray may wait for ever, takes too long."""

    def give_up() -> None:
        os.write(2, f"teacher-server: {text}\n".encode())
        os._exit(2)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
