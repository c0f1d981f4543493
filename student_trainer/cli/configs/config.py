"""`student-trainer config`: what a config comes to, and the schema of what may stand in one. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from student_trainer.cli.asking import ConfigFile, Overrides, print_json
from student_trainer.cli.configs.kinds import Kind, load_any

app = typer.Typer(
    help="Show a resolved config, or the schema of all settings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON in place of YAML")] = False,
) -> None:
    """Print a config as the commands read it: overrides applied, every default written out."""
    import yaml

    tree = load_any(config, overrides).model_dump(mode="json")
    if as_json:
        print_json(tree)
    else:
        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")


@app.command()
def schema(kind: Annotated[Kind, typer.Option(help="of a run, or of traces")] = "run") -> None:
    """Print the JSON schema of all settings, for editors: deploy/schema/ holds it."""
    import json

    from student_trainer.config.run import TrainConfig
    from student_trainer.config.schema.json_schema import json_schema
    from student_trainer.config.traces import TracesConfig

    found = (
        json_schema(TrainConfig, "student-trainer: a run")
        if kind == "run"
        else json_schema(TracesConfig, "student-trainer: traces")
    )
    print(json.dumps(found, indent=1, ensure_ascii=False))


@app.command()
def examples(
    folder: Annotated[
        Path | None, typer.Argument(help="where to copy them; without it only say where they are")
    ] = None,
) -> None:
    """Copy the example configs that this installation carries."""
    from student_trainer.errors import ConfigError
    from teacher_wire.diagnosis.examples import copy_examples, examples_folder

    try:
        print(
            copy_examples(folder.expanduser())
            if folder is not None
            else examples_folder() or "none in this installation"
        )
    except OSError as error:
        raise ConfigError(str(error)) from error
