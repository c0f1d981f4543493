"""What can be seen to be wrong with a config before anything is started: folders, files, the port."""

from __future__ import annotations

import socket

from teacher_server.backends.model_folder import architectures, check_local
from teacher_server.backends.vllm_architectures import check_known
from teacher_server.config import ServerConfig, TransformersBackend, VllmBackend
from teacher_server.edge.auth import TokenFile
from teacher_server.errors import ServerConfigError


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
        if isinstance(teacher.backend, TransformersBackend | VllmBackend):
            try:
                check_local(teacher.backend.model)
                named = architectures(teacher.backend.model)
                if named and isinstance(teacher.backend, VllmBackend):
                    check_known(teacher.backend.model, named)
            except ServerConfigError as error:
                raise ServerConfigError(f"teachers.{teacher.name}.backend.model: {error}") from None
    edge = config.edge
    if edge.tokens_file:
        TokenFile(edge.tokens_file)
    for field, file in vars(edge.tls).items() if edge.tls else ():
        if file is not None and not file.is_file():
            raise ServerConfigError(f"edge.tls.{field} {file}: no such file")
