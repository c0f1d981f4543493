"""`student-trainer evaluate`: one table for a student before, after, and its teacher. Loads no torch before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from student_trainer.cli.asking import progress_console
from student_trainer.errors import ConfigError

if TYPE_CHECKING:
    from student_trainer.config.run import TrainConfig
    from student_trainer.config.teachers import TeacherConfig
    from student_trainer.inference.load import Located

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="run folder, adapter, model folder or hub id; NAME=... to name it"),
    ],
    config: Annotated[
        Path | None, typer.Option(help="run config whose rows, template and teacher are used; a run folder has its own")
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="the student before; 'none' for none. A run folder or an adapter says it itself")
    ] = None,
    base: Annotated[str | None, typer.Option(help="base model of an adapter that names another place")] = None,
    teacher: Annotated[str | None, typer.Option(help="HOST:PORT of a served teacher; 'none' for none")] = None,
    teacher_name: Annotated[str, typer.Option(help="which teacher of the server, if it has several")] = "",
    teacher_tokenizer: Annotated[
        str | None, typer.Option(help="folder of the teacher's tokenizer, if no student has it")
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="held-out rows, any format of docs/data/rows.md; path#N for N of them")
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks by name, or paths of local ones, with commas")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="questions of each task, from its beginning")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="examples before each question; by default as the task says")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="ask tasks by the chat template")
    ] = False,
    answers: Annotated[int, typer.Option(min=0, help="rows that are answered greedily; 0: none")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 256,
    speed: Annotated[bool, typer.Option(help="measure tokens per second and memory")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences of a pass")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    cache_dir: Annotated[Path | None, typer.Option(help="of labels and heads; by default that of the config")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of evaluation.json and .md; by default evaluation/ in the run folder, or here"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print evaluation.json in place of the table")] = False,
) -> None:
    """Measure a student before and after training, and its served teacher: held-out rows, answers, lm-eval tasks, speed."""
    from student_trainer.config.data import SourceConfig
    from student_trainer.evaluation.tasks.evaluate import Request
    from student_trainer.evaluation.tasks.evaluate import evaluate as run

    console = progress_console()
    named = _named(models, before, base)
    loaded = _config(config, named)
    request = Request(
        models=named,
        base=loaded,
        rows=tuple(SourceConfig(path=path) for path in rows or ()),
        teacher=_teacher(teacher, teacher_name, loaded, is_asked_for=config is not None, console=console),
        teacher_tokenizer=teacher_tokenizer,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        limit=limit, shots=shots, chat=apply_chat_template, answers=answers, max_new_tokens=max_new_tokens, with_speed=speed,
        batch_size=batch_size, device=device, dtype=dtype, cache_dir=cache_dir,
    )  # fmt: skip
    try:
        found = run(request, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written", markup=False)
        raise SystemExit(130) from None
    run_folder = next((located.run for _, located in reversed(named) if located.run is not None), None)
    folder = (out or (run_folder or Path()) / "evaluation").expanduser()
    found.write(folder)
    if as_json:
        print(json.dumps(found.json(), ensure_ascii=False))
    else:
        found.show(Console(highlight=False))
    console.print("[bold green]done[/]", end=" ")
    console.print(f"{folder / 'evaluation.json'} and {folder / 'evaluation.md'}", markup=False)


def _named(models: list[str], before: str | None, base: str | None) -> list[tuple[str, Located]]:
    """Name and place of every student, the one before first."""
    from student_trainer.inference.load import locate

    found: list[tuple[str, Located]] = []
    for one in models:
        name, equals, where = one.partition("=")
        if not equals or Path(one).exists():
            name, where = "", one
        if not where:
            raise ConfigError(f"{one}: names no model; NAME=PATH")
        only = len(models) == 1
        found.append((name or ("after" if only else Path(where).name or where), locate(where, base)))
    if before == "none":
        return found
    if before is None:
        told = {found[0][1].before()} if len(found) == 1 else set()
        before = next(iter(told), None)
    return [("before", locate(before)), *found] if before is not None else found


def _config(config: Path | None, named: list[tuple[str, Located]]) -> TrainConfig | None:
    """The config that is named, or that of the last run folder."""
    from student_trainer.config.run import load_config

    if config is not None:
        return load_config(config)
    own = next((located.config for _, located in reversed(named) if located.config is not None), None)
    return None if own is None else load_config(own)


def _teacher(
    address: str | None, name: str, loaded: TrainConfig | None, *, is_asked_for: bool, console: Console
) -> TeacherConfig | None:
    """Whom to ask: the server of the command line, by the TLS and token settings of the config, or the teacher of a config that is named."""
    from student_trainer.config.teachers import TeacherConfig

    every = loaded.every_teacher if loaded is not None else ()
    if address == "none":
        return None
    if address is not None:
        known = every[0] if len(every) == 1 else None
        if known is None or (known.address != address and not name):
            return TeacherConfig(address=address, name=name)
        return _plain(known, address=address, embedded=None, name=name or known.name)
    if name:
        raise ConfigError(f"--teacher-name {name}: belongs to --teacher HOST:PORT")
    if not every:
        return None
    if not is_asked_for:
        console.print("[yellow]note:[/] no teacher is asked: give --teacher HOST:PORT to measure it, and the KL to it")
        return None
    if len(every) > 1:
        raise ConfigError(
            "--config: has several teachers, and one is measured: name it by --teacher HOST:PORT, or --teacher none"
        )
    return _plain(every[0])


def _plain(known: TeacherConfig, **changed: object) -> TeacherConfig:
    """A teacher section without what one of several teachers says beside it."""
    from student_trainer.config.teachers import TeacherConfig

    return TeacherConfig.model_construct(
        **{field: getattr(known, field) for field in TeacherConfig.model_fields} | changed
    )
