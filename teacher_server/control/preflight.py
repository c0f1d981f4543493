"""What can be seen to be wrong with a config before anything is started: folders, files, this machine, the port."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from pathlib import Path

import psutil

from teacher_server.backends.model_folder import architectures, check_local
from teacher_server.backends.vllm.architectures import check_known
from teacher_server.backends.weight_files import check_weights
from teacher_server.config.backends import TransformersBackend, VllmBackend
from teacher_server.config.server import EdgeConfig, RayConfig, ServerConfig
from teacher_server.edge.auth import TokenFile
from teacher_server.edge.tls import check_tls
from teacher_server.errors import ServerConfigError

_SOCKET_PATH_BYTES = 107  # Linux's limit of a Unix socket's name
_RAY_SESSION = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
_GPU_DEVICES = ("nvidia[0-9]*", "nvgpu/*", "nvhost-gpu", "kfd", "dxg")  # of NVIDIA, its boards, AMD, and Windows' Linux
_EDGE_PROCESS = "ray::ServeReplica:lyceum-edge:"


def check(config: ServerConfig) -> bool:
    """Refuses what is bound to fail, before a process is started.

    Returns:
        Whether an edge of a running teacher-server listens on the port now.

    Raises:
        ServerConfigError: a folder, file or port that cannot work, by name.
    """
    check_files(config)
    edge = config.edge
    if edge.count > 1 and edge.host not in ("0.0.0.0", "::", "127.0.0.1", "::1", "localhost"):
        raise ServerConfigError(
            f"edge.host {edge.host}: {edge.count} edges listen on a node each, which needs a host that every node has: 0.0.0.0 or ::"
        )
    if config.ray.own:
        check_machine(config.ray)
        check_gpus(config)
    return check_port(edge)


def check_port(edge: EdgeConfig) -> bool:
    """Refuses a port that cannot be listened on; whether an edge of ours does so already.

    Raises:
        ServerConfigError: why not.
    """
    try:
        family = socket.getaddrinfo(edge.host, edge.port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ServerConfigError(f"edge.host {edge.host}: no address of this machine ({error.strerror})") from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((edge.host, edge.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and _listener(edge.port).startswith(_EDGE_PROCESS):
                return True
            raise ServerConfigError(f"edge.port: cannot listen on {edge.address}: {error.strerror}") from error
    return False


def _listener(port: int) -> str:
    """Title of the process that listens on a port, where we may see it."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return " ".join(psutil.Process(connection.pid).cmdline())
    return ""


def check_machine(ray: RayConfig) -> None:
    """Refuses what would make Ray fail while it starts a cluster of our own here.

    Raises:
        ServerConfigError: naming the variable or setting.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    folder = os.environ[variable] if variable else "/tmp"
    longest = _SOCKET_PATH_BYTES - len(_RAY_SESSION)
    if len(os.fsencode(folder)) > longest:
        raise ServerConfigError(
            f"{variable} has {len(os.fsencode(folder))} characters: Ray's sockets are named below it, which takes at most {longest}; "
            "set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
    _check_writable(Path(folder), f"{variable} {folder}" if variable else folder)
    memory = psutil.virtual_memory().total >> 20
    if ray.object_store_mb > memory:
        raise ServerConfigError(f"ray.object_store_mb {ray.object_store_mb}: this machine has {memory} MiB of memory")
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not (
        os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        _check_home()


def check_gpus(config: ServerConfig) -> None:
    """Refuses a teacher that asks for a GPU where there is no device of one: on a cluster of our own it would wait for ever.

    Raises:
        ServerConfigError: naming the teacher, the setting and what would do without a GPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not hidden and any(path for pattern in _GPU_DEVICES for path in Path("/dev").glob(pattern)):
        return
    why = "CUDA_VISIBLE_DEVICES is empty" if hidden else "this machine has none"
    for teacher in config.teachers:
        device = str(getattr(teacher.backend, "device", ""))
        asked = f"num_gpus={teacher.num_gpus:g}" if teacher.num_gpus else ""
        asked = asked or (f"backend.device={device}" if device.startswith("cuda") else "")
        if asked:
            raise ServerConfigError(
                f"teachers.{teacher.name}.{asked}: asks for a GPU, and {why}; set num_gpus=0 and backend.device=cpu for a trial on "
                "the CPU, or ray.address of a cluster that has GPUs"
            )


def _check_home() -> None:
    """Ray writes the token of its first cluster into the home folder."""
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file() and os.access(folder / "auth_token", os.R_OK):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ServerConfigError(
            f"HOME {os.environ.get('HOME', '(not set)')}: Ray cannot keep its token in ~/.ray/auth_token ({why}); set HOME to a "
            "folder that can be written, or RAY_AUTH_TOKEN to a long random text"
        ) from error


def check_store(folder: Path, name: str = "edge.store.folder") -> None:
    """Refuses a folder in which nothing can be kept; `name` is its setting.

    Raises:
        ServerConfigError: why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerConfigError(f"{name} {folder}: cannot be made: {error.strerror}") from error
    _check_writable(folder, f"{name} {folder}")


def _check_writable(folder: Path, name: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lyceum-probe-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ServerConfigError(f"{name}: nothing can be written there: {error.strerror}") from error


def check_readable(path: Path, name: str) -> None:
    """Refuses a file that is not there or cannot be read.

    Raises:
        ServerConfigError: why.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ServerConfigError(f"{name}: {path}: {error.strerror}") from error


def check_files(config: ServerConfig) -> None:
    """Refuses files and folders that are not what they should be.

    Raises:
        ServerConfigError: naming the setting.
    """
    for teacher in config.teachers:
        if isinstance(teacher.backend, TransformersBackend | VllmBackend):
            try:
                check_local(teacher.backend.model)
                check_weights(teacher.backend.model)
                named = architectures(teacher.backend.model)
                if named and isinstance(teacher.backend, VllmBackend):
                    check_known(teacher.backend.model, named)
            except ServerConfigError as error:
                raise ServerConfigError(f"teachers.{teacher.name}.backend.model: {error}") from None
        if teacher.features is not None and teacher.features.calibration is not None:
            check_readable(teacher.features.calibration.expanduser(), f"teachers.{teacher.name}.features.calibration")
        if teacher.publish is not None:
            check_store(teacher.publish.folder.expanduser(), f"teachers.{teacher.name}.publish.folder")
    edge = config.edge
    if edge.tokens_file:
        TokenFile(edge.tokens_file)
    if edge.store.folder:
        check_store(edge.store.folder.expanduser())
    if edge.tls:
        check_tls(edge.tls)
