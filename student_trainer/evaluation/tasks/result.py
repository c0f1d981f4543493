"""What an evaluation found, as evaluation.json, as Markdown, and as a table for a console.

In: figures per model; out: text. One row per figure, one column per model: before, after, teacher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.errors import NonFiniteError
from student_trainer.files import disk_trouble_named, write_whole

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1
JSON_NAME, MARKDOWN_NAME = "evaluation.json", "evaluation.md"
# figure -> (label, how it is written); others are shown by their own names.
_SHOWN = {
    "acc1": ("acc1 ↑", "{:.4f}"),
    "acc3": ("acc3 ↑", "{:.4f}"),
    "avg_response_len": ("avg_response_len, tokens", "{:,.1f}"),
    "cut_off": ("answers cut off, share", "{:.2f}"),
    "nll_per_byte": ("NLL, nats per byte ↓", "{:.4f}"),
    "nll_per_token": ("NLL, nats per token ↓", "{:.4f}"),
    "kl_to_teacher": ("KL to teacher, nats per token ↓", "{:.4f}"),
}
_SPEED = {
    "prefill_tokens_per_s": ("prefill, tok/s", 1.0, "{:,.0f}"),
    "decode_tokens_per_s": ("decode, tok/s", 1.0, "{:,.1f}"),
    "peak_memory_bytes": ("peak memory, GiB", 2.0**-30, "{:.2f}"),
}


def label_of(name: str) -> str:
    """What a figure is called in tables, with its unit; a name that is not ours stays as it is."""
    return (_SHOWN.get(name) or _SPEED.get(name) or (name,))[0]


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        name: before, after, teacher, or what the user calls it.
        what: path, hub id, or name and address of the teacher.
        metrics: figures of held-out rows and answers by name.
        tasks: of lm-eval, by task, as `harness.run_tasks` gives them.
        speed: as `speed.Speed.figures`; empty if it was not measured.
    """

    name: str
    what: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """
        Raises:
            NonFiniteError: a figure is no number.
        """
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{self.name} ({self.what}): {name} is {value}: its weights or its logits are not finite"
                )


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        models: in the order of the table.
        samples: questions with the answer of each model, to read.
        settings: what the figures depend on beside the models.
        versions: of the packages that computed them.
    """

    models: tuple[Measured, ...]
    samples: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        """The object of evaluation.json."""
        return {
            "format": FORMAT,
            "models": [
                {
                    "name": one.name,
                    "what": one.what,
                    "metrics": dict(one.metrics),
                    "tasks": {name: dict(task) for name, task in one.tasks.items()},
                    "speed": dict(one.speed),
                }
                for one in self.models
            ],
            "samples": [dict(sample) for sample in self.samples],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def table(self) -> list[list[str]]:
        """Header and rows; "n/a" where a model has no such figure."""
        rows = [["", *(one.name for one in self.models)]]
        for name in _names([one.metrics for one in self.models], _SHOWN):
            label, form = _SHOWN.get(name, (name, "{:.4f}"))
            rows.append([label, *(_cell(one.metrics.get(name), form) for one in self.models)])
        for name in dict.fromkeys(name for one in self.models for name in one.tasks):
            found = [one.tasks.get(name, {}) for one in self.models]
            metric = next((task["metric"] for task in found if task.get("metric")), "no metric")
            rows.append([f"{name}, {metric}", *(_task_cell(task) for task in found)])
        for name in _names([one.speed for one in self.models], _SPEED):
            if name in _SPEED:
                label, unit, form = _SPEED[name]
                values = [one.speed.get(name) for one in self.models]
                rows.append([label, *(_cell(None if v is None else v * unit, form) for v in values)])
        return rows

    def markdown(self) -> str:
        """The table, what was measured, and the sample answers."""
        header, *rows = self.table()
        lines = ["# Evaluation", "", *(f"- **{one.name}**: {one.what}" for one in self.models), ""]
        lines += ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]  # fmt: skip
        lines += ["", *(f"{name}: {value}  " for name, value in self.settings.items() if value not in (None, "", []))]
        for sample in self.samples:
            lines += ["", "## " + " ".join(str(sample["prompt"]).split())[:120], ""]
            for name, text in sample["answers"].items():
                lines += [f"**{name}**", "", *(f"> {line}" for line in str(text).splitlines() or [""]), ""]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path) -> None:
        """evaluation.json and evaluation.md, in place of older ones.

        Raises:
            RunError: the disk does not take them.
        """
        with disk_trouble_named(f"--out {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MARKDOWN_NAME, self.markdown())
            write_whole(folder / JSON_NAME, json.dumps(self.json(), indent=1, ensure_ascii=False) + "\n")

    def show(self, console: Console) -> None:
        """The table on a console."""
        from rich.markup import escape
        from rich.table import Table

        header, *rows = self.table()
        table = Table()
        table.add_column("", overflow="fold")
        for name in header[1:]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for cells in rows:
            table.add_row(*map(escape, cells))
        console.print(table)


def _names(groups: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> list[str]:
    """Every name in the groups, those that are known before others."""
    held = dict.fromkeys(name for group in groups for name in group)
    return [*(name for name in first if name in held), *(name for name in held if name not in first)]


def _cell(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _task_cell(task: Mapping[str, Any]) -> str:
    if task.get("value") is None:
        return "n/a"
    stderr = task.get("stderr")
    return f"{task['value']:.4f}" + (f" ± {stderr:.4f}" if stderr else "")


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
