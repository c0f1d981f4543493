"""Signals of layers at a replica: the backend made ready for them, and how much of a pass one request may make it hold.

What is captured of a pass weighs more than what is answered: a row of states is thousands of values, its label may be one.
"""

from __future__ import annotations

from teacher_server.backends import Backend, build_backend
from teacher_server.backends.base import CalibratedBackend
from teacher_server.config.server import TeacherConfig
from teacher_server.errors import ServerConfigError
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import LimitError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.score import codec


def ready(config: TeacherConfig, backend: Backend | None) -> Backend:
    """The backend, loaded if it is not given, and calibrated if the config says so.

    Raises:
        ServerConfigError: it cannot be.
    """
    backend = backend or build_backend(config.backend, deterministic=config.deterministic)
    if config.features is not None:
        if not isinstance(backend, CalibratedBackend):
            raise ServerConfigError(
                f"features of teacher {config.name!r}: backend {config.backend.kind} gives no states of layers: remove `features`"
            )
        backend.calibrate(config.features)
    return backend


def held_bytes(call: ScoreCall, info: TeacherInfo, most: int) -> int:
    """Bytes that a request makes the device hold, labels and what they are made of, once it is checked.

    Args:
        call: the request.
        info: of the teacher.
        most: for what labels are made of.

    Raises:
        TeacherWireError: as `codec.check_call`.
        LimitError: more than that.
    """
    answered = codec.check_call(call, info)
    captured = call.spec.held_bytes(call.batch, call.spec.shape_of(info))
    if captured > most:
        raise LimitError(
            f"too many layers of too many tokens for teacher {info.name!r}: ask for fewer layers or shorter requests",
            field="bytes captured", value=captured, limit=most,
        )  # fmt: skip
    return answered + captured
