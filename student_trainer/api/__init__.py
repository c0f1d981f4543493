"""Our teacher in other people's loops: connect to a server, ask it for labels, and turn them into a loss with gradients.

    from student_trainer.api import connect, gkd_loss

    with connect("gpu-box:50051", token="...", tokenizer=tokenizer) as teacher:
        for batch, labels in teacher.ahead(loader):
            loss = gkd_loss(model(batch["input_ids"]).logits, labels, sft_weight=0.5).loss

Importing this package loads no torch; the first use of a name does. Errors are those of the product: `StudentError` for what a
user can mend, `TeacherWireError` for what happens between student and teacher.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from student_trainer.errors import ConfigError, DataError, ModelError, RunError, StudentError
from teacher_wire.core.errors import OverloadedError, TeacherWireError, UnavailableError

if TYPE_CHECKING:
    from student_trainer.api.labels import Labels
    from student_trainer.api.loss import GkdLoss, gkd_loss
    from student_trainer.api.run import train
    from student_trainer.api.teacher import Teacher, connect
    from student_trainer.training.run_folder import RunResult

__all__ = [
    "ConfigError",
    "DataError",
    "GkdLoss",
    "Labels",
    "ModelError",
    "OverloadedError",
    "RunError",
    "RunResult",
    "StudentError",
    "Teacher",
    "TeacherWireError",
    "UnavailableError",
    "connect",
    "gkd_loss",
    "train",
]

_MODULES = {
    "GkdLoss": "student_trainer.api.loss",
    "Labels": "student_trainer.api.labels",
    "RunResult": "student_trainer.training.run_folder",
    "Teacher": "student_trainer.api.teacher",
    "connect": "student_trainer.api.teacher",
    "gkd_loss": "student_trainer.api.loss",
    "train": "student_trainer.api.run",
}


def __getattr__(name: str) -> Any:
    """The names whose modules load torch, read when they are first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
