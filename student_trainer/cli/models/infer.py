"""`student-trainer infer`: a chat in the terminal, or a file of prompts in and answers out. Loads no torch before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from student_trainer.cli.asking import progress_console
from student_trainer.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def infer(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="run folder, adapter, model folder or hub id; HOST:PORT for a served teacher; NAME=... to name it",
        ),
    ],
    base: Annotated[str | None, typer.Option(help="base model of an adapter that names another place")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="side by side: several models, or a run beside what it was before")
    ] = False,
    prompts: Annotated[
        str | None, typer.Option(help="file of prompts: plain lines, or rows as training reads them")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file of answers, JSON lines in the order of the prompts")] = None,
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    temperature: Annotated[float, typer.Option(help="0: the likeliest token every time")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of the probability that is drawn from")] = 1.0,
    top_k: Annotated[int, typer.Option(help="likeliest tokens that are drawn from; 0: all")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="of an answer")] = 512,
    seed: Annotated[int, typer.Option(help="of all answers; each has a stream of its own")] = 0,
    template: Annotated[str, typer.Option(help="auto, chat, plain, a name, or a file such as ./x.jinja")] = "auto",
    template_kwargs: Annotated[str, typer.Option(help="variables of the template, as JSON")] = "{}",
    batch_size: Annotated[int, typer.Option(min=1, help="prompts of a file that are answered at a time")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    config: Annotated[
        Path | None,
        typer.Option(help="run config whose section teacher says how a server is reached (TLS, token, name)"),
    ] = None,
    teacher_tokenizer: Annotated[
        str | None, typer.Option(help="folder of a teacher's tokenizer, if no student has it")
    ] = None,
) -> None:
    """Talk to a student, or have it answer a file of prompts."""
    if (prompts is None) != (out is None):
        raise ConfigError("--prompts and --out belong together: a file of prompts in, a file of answers out")
    console = progress_console()
    teacher = None
    if config is not None:
        from student_trainer.config.run import load_config

        teacher = load_config(config).teacher
        if teacher is None:
            raise ConfigError(f"--config {config}: has no section teacher, which is all that is read of it here")
    from student_trainer.inference.by_file import answer_file
    from student_trainer.inference.chat import Chat
    from student_trainer.inference.prompt_file import read_prompts
    from student_trainer.inference.sampling import Sampling
    from student_trainer.inference.speakers import Opening, is_address, open_speakers

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    named = _named(models, compare=compare, base=base)
    if top_k and any(is_address(where) for _, where in named):
        raise ConfigError(
            f"--top-k {top_k}: a served teacher samples by temperature and top-p alone; leave --top-k out"
        )
    asked = read_prompts(prompts, system) if prompts is not None else []
    opening = Opening(
        base, device, dtype, batch_size, template, _variables(template_kwargs), teacher, teacher_tokenizer
    )
    with open_speakers(named, opening, console) as speakers:
        if out is None:
            Chat(speakers, sampling, system, Console(highlight=False, soft_wrap=True), console).run()
            return
        try:
            before = answer_file(asked, speakers, sampling, out, console, batch_size)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on where it was", markup=False)
            raise SystemExit(130) from None
    there = f", {before:,} of them by an earlier call" if before else ""
    console.print(f"[bold green]done[/] {len(asked):,} answers are in {escape(str(out))}{there}")


def _named(models: list[str], *, compare: bool, base: str | None) -> list[tuple[str, str]]:
    """Name and place of everybody who answers."""
    from student_trainer.inference.load import locate
    from student_trainer.inference.speakers import is_address

    found = []
    for one in models:
        name, equals, where = one.partition("=")
        if not equals or Path(one).exists():
            name, where = "", one
        if not where:
            raise ConfigError(f"{one}: names no model; NAME=PATH or NAME=HOST:PORT")
        found.append((name or ("teacher" if is_address(where) else Path(where).name or where), where))
    if not compare:
        if len(found) > 1:
            raise ConfigError(f"{len(found)} models are named, and one answers: add --compare to see them side by side")
        return found
    students = [pair for pair in found if not is_address(pair[1])]
    if len(students) == 1 and "=" not in "".join(models):
        located = locate(students[0][1], base)
        before = located.before()
        if before is None:
            raise ConfigError(
                f"--compare {located.named}: does not say what it was before; name both: before=PATH after=PATH"
            )
        found = [("before", before), ("after", located.named), *(pair for pair in found if pair not in students)]
    if len(found) < 2:
        raise ConfigError("--compare needs two models: before=PATH after=PATH teacher=HOST:PORT, or a run folder alone")
    return found


def _variables(text: str) -> dict[str, object]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--template-kwargs {text}: is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"--template-kwargs {text}: must be an object, such as '{{\"enable_thinking\": false}}'")
    return read
