"""`student-trainer check`: what can be told of a config without asking its teacher and without tokenising its rows.

Loads torch only to see the student's architecture and this machine's device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from student_trainer.cli.asking import AsJson, ConfigFile, Overrides, Resume, print_json
from student_trainer.cli.configs.kinds import load_any

if TYPE_CHECKING:
    from student_trainer.config.data import SourceConfig
    from student_trainer.config.run import TrainConfig
    from student_trainer.config.teachers import TeacherConfig
    from student_trainer.config.traces import TracesConfig
    from student_trainer.data.rows.intake import SourceFacts
    from student_trainer.findings import Finding, Findings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None, resume: Resume = False, as_json: AsJson = False) -> None:
    """Check a config, its files and this machine; ask no teacher, tokenise nothing, write nothing.

    `plan` checks all the rest. Exits with 2 if something must be changed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: this command asks nobody
    loaded = load_any(config, overrides)
    from student_trainer.config.run import TrainConfig

    found = _of_run(loaded, resume) if isinstance(loaded, TrainConfig) else _of_traces(loaded)
    bad = [finding for finding in found if not finding.ok]
    if as_json:
        rows = [{"ok": one.ok, "setting": one.setting, "what": one.what, "fix": one.fix} for one in found]
        print_json({"config": config, "ok": not bad, "findings": rows})
    else:
        _show(found, str(config), len(bad))
    if bad:
        raise typer.Exit(2)


def _of_run(config: TrainConfig, resume: bool) -> list[Finding]:
    from student_trainer.data.inputs import check_field
    from student_trainer.findings import Findings
    from student_trainer.training.checks import check_folder, check_settings
    from student_trainer.training.tracking.trackers import make_trackers

    findings = Findings(stops=False)
    findings.add(check_settings(config))
    findings.attempt("train.report_to", lambda: make_trackers(config, lambda _: None), "trackers work")
    findings.add(check_folder(config, resume))
    _model(findings, config)
    findings.add(_device(config))
    facts: list[SourceFacts] = []
    for number, source in enumerate(config.data.train):
        facts += _source(findings, f"data.train[{number}]", source, config)
    if config.data.tag_field is not None and len(facts) == len(config.data.train):
        findings.attempt(
            "data.tag_field",
            partial(check_field, "data.tag_field", config.data.tag_field, facts),
            "rows have the field of tags",
        )
    for number, source in enumerate(config.data.eval):
        _source(findings, f"data.eval[{number}]", source, config)
    for teacher in config.every_teacher:
        _teacher(findings, teacher)
    return findings.all


def _model(findings: Findings, config: TrainConfig) -> None:
    """Whether the student can be read; a hub id that has not been fetched yet is left to `plan`, which asks the hub."""
    from huggingface_hub import try_to_load_from_cache

    from student_trainer.data.rows.sources import HUB_ID
    from student_trainer.findings import Finding
    from student_trainer.model.load import load_outline

    path = str(config.model.path)
    is_id = HUB_ID.fullmatch(path) is not None and path[0] != "." and path.count("/") == 1 and not Path(path).exists()
    fetched = [
        name
        for name in ("config.json", "adapter_config.json")
        if is_id and isinstance(try_to_load_from_cache(path, name, revision=config.model.revision), str)
    ]
    if is_id and not fetched:
        told = f"{path} is no folder here and has not been fetched from the hub yet; `plan` and `train` ask the hub"
        findings.add([Finding.good("model.path", told, told)])
        return
    findings.attempt("model.path", lambda: load_outline(config.model), f"{path} can be read")


def _of_traces(config: TracesConfig) -> list[Finding]:
    from student_trainer.findings import Findings

    findings = Findings(stops=False)
    for number, source in enumerate(config.data.sources):
        _source(findings, f"data.sources[{number}]", source)
    _teacher(findings, config.teacher)
    return findings.all


def _source(
    findings: Findings, name: str, source: SourceConfig, config: TrainConfig | None = None
) -> list[SourceFacts]:
    """Whether the rows of a source are there; if they are a run's, whether they have a format, and what they hold.

    A hub id is left to `plan`, which may fetch it.
    """
    from student_trainer.data.inputs import source_of
    from student_trainer.data.rows.intake import Intake
    from student_trainer.data.rows.sources import HUB_ID, local_path, read_source
    from student_trainer.data.trace_rows import TraceTasks, task_rows

    made = findings.attempt(name, partial(source_of, source), f"{name} is a source")
    if made is None:
        return []
    if HUB_ID.fullmatch(made.path) and not local_path(made.path).exists() and not Path(made.path).suffix:
        return []
    intake = Intake("refuse" if config is None else config.data.bad_rows)

    def read() -> None:
        if config is None:
            read_source(made)
            return
        asides = [context.field for context in (config.context, *config.contexts.values()) if context is not None]
        fields = frozenset([*asides, *([config.data.tag_field] if config.data.tag_field else [])])
        rows = [replace(row, beside=fields) for row in read_source(made, intake)]
        tasks = TraceTasks(**config.data.traces.model_dump())
        task_rows(rows, made.format, config.data.system_prompt or "", tasks, intake, made.path)

    findings.attempt(name, read, f"the rows of {made.path} can be read")
    return intake.sources


def _teacher(findings: Findings, teacher: TeacherConfig) -> None:
    from student_trainer.errors import ConfigError
    from student_trainer.teachers.connect import check_way

    def look() -> None:
        if teacher.embedded is not None and not teacher.embedded.is_file():
            raise ConfigError(f"teacher.embedded {teacher.embedded}: no such file")
        check_way(teacher)

    findings.attempt("teacher", look, "what connecting to the teacher needs is there; `plan` asks whether it answers")


def _device(config: TrainConfig) -> Iterator[Finding]:
    """Says of a config that is made for a GPU that this machine has none."""
    import torch

    from student_trainer.findings import Finding

    if torch.cuda.is_available():
        yield Finding.good("model", f"{torch.cuda.device_count()} GPU(s): {torch.cuda.get_device_name(0)}")
        return
    signs = [
        name
        for name, is_set in (
            (f"model.dtype={config.model.dtype}", config.model.dtype != "float32"),
            ("train.bf16=true", config.train.bf16),
            (f"model.attention={config.model.attention}", config.model.attention == "flash_attention_2"),
            ("model.compiled=true", config.model.compiled is True),
            ("model.graphs=true", config.model.graphs is True),
        )
        if is_set
    ]
    hidden = " (CUDA_VISIBLE_DEVICES is empty)" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else ""
    if not signs:
        yield Finding.good("model", f"no GPU here{hidden}; the config asks for none")
        return
    told = f"this machine has no GPU{hidden}, and {', '.join(signs)} {'are' if len(signs) > 1 else 'is'} meant for one"
    advice = f"{told}: it would run on the CPU, slowly; for a trial set model.dtype=float32 train.bf16=false"
    impossible = config.model.attention == "flash_attention_2" or config.model.graphs is True
    if impossible:
        yield Finding.bad("model", told, "run it where there is a GPU, or leave these out")
    else:
        yield Finding.good("model", told, advice)


def _show(found: list[Finding], name: str, bad: int) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    for finding in found:
        if finding.ok and not finding.fix:
            continue
        mark = "[yellow]note[/]" if finding.ok else "[red]bad [/]"
        told = finding.fix if finding.ok else finding.what + (f": {finding.fix}" if finding.fix else "")
        console.print(f"{mark} {escape(finding.setting)}: {escape(told)}")
    passed = sum(finding.ok for finding in found)
    end = f"[bold red]{bad} to be changed[/]" if bad else "[bold green]fine[/]"
    console.print(
        f"{escape(name)}: {end} ({passed} of {len(found)} checks passed; `student-trainer plan` asks the teacher too)"
    )
