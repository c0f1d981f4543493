"""The two kinds of configs that this house reads: of a run, and of traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from student_trainer.config.run import TrainConfig
    from student_trainer.config.traces import TracesConfig

Kind = Literal["run", "traces"]


def load_any(path: Path, overrides: list[str] | None) -> TrainConfig | TracesConfig:
    """A config of the kind that the file holds: one without the section `model` and with `tokenizer` or `sampling` is of traces.

    Raises:
        ConfigError: one line that names file and key.
    """
    from student_trainer.config.files import read_tree
    from student_trainer.config.run import load_config
    from student_trainer.config.traces import load_traces_config

    tree = read_tree(path.expanduser(), overrides)
    is_traces = "model" not in tree and bool({"tokenizer", "sampling"} & tree.keys())
    return load_traces_config(path, overrides) if is_traces else load_config(path, overrides)
