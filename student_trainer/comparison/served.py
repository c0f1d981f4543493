"""Embedded teachers of a comparison: each is started once for all runs, when the first run needs it, and stopped at the end."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import TeacherConfig
from student_trainer.progress import working
from student_trainer.teachers.embedded import embedded_teacher

Teacher = TypeVar("Teacher", bound=TeacherConfig)


class Served(contextlib.ExitStack):
    """Started servers, until the block ends.

    Args:
        console: told while one starts.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._addresses: dict[Path, str] = {}

    def config(self, config: TrainConfig) -> TrainConfig:
        """The same run, which finds its embedded teachers at an address.

        Raises:
            ConfigError, RunError: as `embedded_teacher`.
        """
        teacher = None if config.teacher is None else self._served(config.teacher)
        return config.model_copy(
            update={"teacher": teacher, "teachers": tuple(self._served(teacher) for teacher in config.teachers)}
        )

    def _served(self, teacher: Teacher) -> Teacher:
        if teacher.embedded is None:
            return teacher
        file = teacher.embedded
        if file not in self._addresses:
            with working(self._console, f"starting the embedded teacher of {file}, for all runs"):
                self._addresses[file] = self.enter_context(embedded_teacher(file))
        return teacher.model_copy(update={"address": self._addresses[file], "embedded": None})
