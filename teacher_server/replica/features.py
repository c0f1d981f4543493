"""Signals of layers at a replica: the backend made ready for them, and how much of a pass one sequence may make it hold.

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

CAPTURED_BYTES = 4 << 30


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


def check_call(call: ScoreCall, info: TeacherInfo) -> int:
    """`codec.check_call`, and that no sequence makes the device hold more of a pass than it should; the reply's bytes.

    Raises:
        TeacherWireError: as `codec.check_call`.
        LimitError: more than CAPTURED_BYTES for one sequence. Several are captured one after the other.
    """
    answered = codec.check_call(call, info)
    captured = call.spec.captured_bytes(call.batch, call.spec.shape_of(info))
    if captured > CAPTURED_BYTES:
        raise LimitError(
            f"too many layers of too long a sequence for teacher {info.name!r}: ask for fewer layers or shorter sequences",
            field="bytes captured", value=captured, limit=CAPTURED_BYTES,
        )  # fmt: skip
    return answered
