"""`teacher-server doctor`: everything around a server that can be wrong, each as one line with its fix; changes nothing, starts nothing.

In: a config, or none; out: checks. Unlike `preflight.check`, which `up` stops at, it makes no folder and goes on after what is broken.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from teacher_server.backends.model_folder import check_local
from teacher_server.backends.weight_files import check_weights
from teacher_server.config.backends import TransformersBackend, VllmBackend
from teacher_server.config.server import ServerConfig, TeacherConfig, TlsConfig, load_config
from teacher_server.control.preflight import check_port
from teacher_server.edge.auth import TokenFile
from teacher_server.edge.tls import check_tls
from teacher_server.errors import ServerConfigError
from teacher_wire.diagnosis import certificates, machine
from teacher_wire.diagnosis.check import Check, surviving

_EVERYWHERE = ("0.0.0.0", "::")
_VLLM = {"vllm": "", "xgrammar": ">=0.2.8,<0.3"}


def examine(path: Path | None, overrides: list[str] | None) -> Iterator[Check]:
    """All checks.

    Args:
        path: of a server's config; None: the machine alone.
        overrides: of it.
    """
    yield from surviving("versions", lambda: machine.versions("teacher", _VLLM))
    yield from surviving("GPU driver", machine.gpu)
    yield from surviving("file limits", machine.file_limits)
    yield from surviving("clock", machine.clock)
    yield from surviving("proxy", lambda: machine.proxies({}))
    yield from surviving("Ray's folder", _ray_folder)
    if path is None:
        return
    try:
        config = load_config(path, overrides)
    except (ServerConfigError, OSError) as error:
        yield Check("bad", "config", str(error), "mend the line it names")
        return
    yield Check("ok", "config", f"{path}: can be read")
    yield from surviving("edge.port", lambda: _port(config))
    if config.edge.tls is not None:
        tls = config.edge.tls
        yield from surviving("edge.tls", lambda: _tls(config, tls))
    if config.edge.tokens_file is not None:
        yield from surviving("edge.tokens_file", lambda: _tokens(config))
    store = config.edge.store
    if store.folder is not None:
        folder = store.folder.expanduser()
        yield from surviving("edge.store.folder", lambda: machine.folder(folder, "edge.store.folder", store.disk_gb))
    yield from surviving("GPU", lambda: _gpus(config))
    for teacher in config.teachers:
        subject = f"teachers.{teacher.name}"
        yield from surviving(subject, lambda teacher=teacher: _teacher(teacher))  # type: ignore[misc]


def _ray_folder() -> Iterator[Check]:
    folder = Path(next((os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "/tmp"))
    yield from machine.folder(folder, "Ray's folder", 5.0)


def _port(config: ServerConfig) -> Iterator[Check]:
    edge = config.edge
    try:
        running = check_port(edge)
    except ServerConfigError as error:
        yield Check(
            "bad",
            "edge.port",
            str(error),
            "end what listens there (ss -ltnp), or choose another edge.port or edge.host",
        )
        return
    yield Check(
        "ok", "edge.port", f"{edge.address}: " + ("a teacher-server listens there now" if running else "is free")
    )


def _tls(config: ServerConfig, tls: TlsConfig) -> Iterator[Check]:
    try:
        check_tls(tls)
    except ServerConfigError as error:
        yield Check(
            "bad",
            "edge.tls",
            str(error),
            "make a new certificate and key, or correct the path (docs/operate/operating.md)",
        )
        return
    found = certificates.own_certificate(tls.cert_file.expanduser(), tls.key_file.expanduser())
    if not found:
        yield Check(
            "note",
            "edge.tls",
            "its certificate can be used, and does not say for how long",
            "look: openssl x509 -noout -dates",
        )
        return
    yield certificates.dated(found, "edge.tls")
    names = certificates.names_of(found)
    ours = {config.edge.host} if config.edge.host not in _EVERYWHERE else {socket.gethostname(), socket.getfqdn()}
    if not names:
        yield Check(
            "bad",
            "edge.tls",
            "its certificate names no host (subjectAltName), and students refuse that",
            "add subjectAltName=DNS:...",
        )
    elif not ours & set(names):
        told = f"its certificate is for {', '.join(names)}, this machine is {', '.join(sorted(ours))}"
        yield Check("note", "edge.tls", told, "students must connect by a name in the certificate")


def _tokens(config: ServerConfig) -> Iterator[Check]:
    assert config.edge.tokens_file is not None
    try:
        TokenFile(config.edge.tokens_file)
    except ServerConfigError as error:
        yield Check("bad", "edge.tokens_file", str(error), "a line for each tenant: TENANT TOKEN")
    else:
        yield Check("ok", "edge.tokens_file", f"{config.edge.tokens_file}: can be read")


def _gpus(config: ServerConfig) -> Iterator[Check]:
    """What torch sees, against what the teachers ask for."""
    import torch

    there, asked = torch.cuda.device_count(), sum(teacher.num_gpus for teacher in config.teachers)
    told = f"{there} GPUs are seen by torch {torch.__version__}, the teachers ask for {asked:g} a replica each"
    if asked > there and config.ray.own:
        yield Check("bad", "GPU", told, "lower teachers[].num_gpus, or install a torch with CUDA and the driver")
    else:
        yield Check("ok", "GPU", told)


def _teacher(teacher: TeacherConfig) -> Iterator[Check]:
    subject = f"teachers.{teacher.name}"
    backend = teacher.backend
    if not isinstance(backend, TransformersBackend | VllmBackend):
        yield Check("ok", subject, f"backend {backend.kind} reads no model")
        return
    try:
        check_local(backend.model)
        check_weights(backend.model)
    except ServerConfigError as error:
        yield Check("bad", subject, str(error), f"correct {subject}.backend.model")
    else:
        there = Path(backend.model).expanduser().is_dir()
        what = "holds a model" if there else "is taken from the hub, which was not asked"
        yield Check("ok", subject, f"{backend.model} {what}")
    if isinstance(backend, VllmBackend):
        yield machine.version("vllm", "", needed=True)
    if teacher.publish is not None:
        yield from machine.folder(teacher.publish.folder.expanduser(), f"{subject}.publish.folder", 10.0)
