"""`student-trainer compare`: arms of one config, trained alike with several seeds, as one table. Loads no torch before it runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape

from student_trainer.cli.asking import ConfigFile, Overrides, going_on, progress_console
from student_trainer.cli.frame.habits import ConfigCommand
from student_trainer.errors import ConfigError

if TYPE_CHECKING:
    from student_trainer.comparison.plan import Comparison

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_APART = "\x1f"  # between the name and the settings of a free arm, on the way through typer, which has no options of two values in a list
_EQUAL = ("steps", "time")


class _Arms(ConfigCommand):
    """Lets `--arms` take all names up to the next option or override, and `--arm` a name and its settings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spelt_out(args))


def spelt_out(args: list[str]) -> list[str]:
    """`--arms a b` as `--arms a --arms b`, and `--arm NAME SETTINGS` as one value; everything else as it is.

    Raises:
        ConfigError: an option has no value.
    """
    found: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*found, word, *rest]
        if word == "--arms" or word.startswith("--arms="):
            names = [word.partition("=")[2]] if "=" in word else []
            while rest and not rest[0].startswith("-") and "=" not in rest[0]:
                names.append(rest.pop(0))
            names = [name for given in names for name in given.split(",") if name]
            if not names:
                raise ConfigError("--arms: names none; e.g. --arms sft gkd gkd+sft")
            for name in names:
                found += ["--arms", name]
        elif word == "--arm":
            if len(rest) < 2 or rest[0].startswith("-"):
                raise ConfigError(
                    "--arm: needs a name and settings, e.g. --arm k8 'gkd labels.transport=top_k labels.k=8'"
                )
            found += ["--arm", f"{rest.pop(0)}{_APART}{rest.pop(0)}"]
        else:
            found.append(word)
    return found


@app.command(cls=_Arms)
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="names, the first being the base: config, sft, gkd, gkd+sft, on-policy, article, full, lora, qlora",
            metavar="NAME...",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="an arm of your own: names of arms, then overrides, in quotes", metavar="NAME SETTINGS"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="how many, from run.seed upwards")] = 3,
    equal: Annotated[str, typer.Option(help="what the arms are given alike: steps, or time")] = "steps",
    minutes: Annotated[float | None, typer.Option(help="of training per run, with --equal time")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; run.output_dir with -compare behind it if left out")] = None,
) -> None:
    """Train arms of one config with several seeds, and compare them by paired differences with 95 % intervals.

    The same line again goes on where it was: finished runs are not made again, and further arms or seeds may be added.
    """
    if equal not in _EQUAL:
        raise ConfigError(f"--equal {equal}: choose {' or '.join(_EQUAL)}")
    if minutes is not None and not 0 < minutes < 1e6:
        raise ConfigError(f"--minutes {minutes:g}: must be above 0")
    if not arms and not arm:
        raise ConfigError("compare: no arm is named: add --arms sft gkd gkd+sft, for one")
    from student_trainer.config.run import load_config

    loaded = load_config(config, overrides)  # its own errors first, and nothing heavy
    folder = (out or loaded.run.output_dir.with_name(f"{loaded.run.output_dir.name}-compare")).expanduser().absolute()
    plan = _plan(config, overrides, arms or [], arm or [], loaded.run.seed, seeds, equal, minutes, folder)
    console = progress_console()
    from student_trainer.comparison.run import MARKDOWN_NAME
    from student_trainer.comparison.run import compare as run
    from student_trainer.evaluation.report import print_table

    more = _again(arms or [], arm or [], seeds, equal, minutes, folder)
    with going_on(console, "compare", config, overrides, more):
        outcome = run(plan, console, console)
    if any(run_.metrics for run_ in outcome.arms):
        print_table(outcome.results(), Console(highlight=False, soft_wrap=True))
    for told in outcome.notes:
        console.print(f"note: {told}", style="yellow", markup=False)
    failed = [run_ for run_ in outcome.arms if run_.state != "done"]
    written = f"{folder / MARKDOWN_NAME}, {folder / 'comparison.json'}; a page of it: student-trainer report {shlex.quote(str(folder))}"
    if failed:
        names = ", ".join(f"{run_.name} seed {run_.seed}" for run_ in failed)
        console.print(
            f"[bold red]not done:[/] {len(failed)} of {len(outcome.arms)} runs failed ({escape(names)}); the others are in"
        )
        console.print(written, markup=False)
        raise typer.Exit(2)
    console.print(f"[bold green]done[/] {len(outcome.arms)} runs")
    console.print(written, markup=False)


def _plan(
    config: Path,
    overrides: list[str] | None,
    names: list[str],
    free: list[str],
    first_seed: int,
    seeds: int,
    equal: str,
    minutes: float | None,
    folder: Path,
) -> Comparison:
    from student_trainer.comparison.arms import free_arm, named_arm
    from student_trainer.comparison.plan import Comparison
    from student_trainer.config.files import read_tree

    arms = [*map(named_arm, names), *(free_arm(*given.split(_APART, 1)) for given in free)]
    return Comparison(
        tree=read_tree(config.expanduser(), overrides),
        origin=str(config),
        arms=arms,
        seeds=range(first_seed, first_seed + seeds),
        folder=folder,
        equal=cast(Literal["steps", "time"], equal),
        minutes=minutes,
    )


def _again(names: list[str], free: list[str], seeds: int, equal: str, minutes: float | None, folder: Path) -> str:
    """The options of the same comparison, as a shell takes them."""
    words = [*(["--arms", *names] if names else [])]
    for given in free:
        words += ["--arm", *given.split(_APART, 1)]
    words += ["--seeds", str(seeds)]
    words += ["--equal", equal, "--minutes", f"{minutes:g}"] if minutes is not None else []
    return shlex.join([*words, "--out", str(folder)])
