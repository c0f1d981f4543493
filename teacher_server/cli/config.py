"""`teacher-server config`: what a config comes to, and the schema of what may stand in one. Loads neither torch nor ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teacher_server.cli.asking import ConfigPath, Overrides, print_json

app = typer.Typer(
    help="Show a resolved config, or the schema of all settings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON in place of YAML")] = False,
) -> None:
    """Print a config as `up` reads it: overrides applied, every default written out."""
    import yaml

    from teacher_server.config.server import load_config

    tree = load_config(config, overrides).model_dump(mode="json")
    if as_json:
        print_json(tree)
    else:
        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of all settings, for editors: deploy/schema/ holds it."""
    import json

    from teacher_server.config.schema.json_schema import json_schema
    from teacher_server.config.server import ServerConfig

    print(json.dumps(json_schema(ServerConfig, "teacher-server"), indent=1, ensure_ascii=False))


@app.command()
def examples(
    folder: Annotated[
        Path | None, typer.Argument(help="where to copy them; without it only say where they are")
    ] = None,
) -> None:
    """Copy the example configs that this installation carries."""
    from teacher_server.errors import ServerConfigError
    from teacher_wire.diagnosis.examples import copy_examples, examples_folder

    try:
        print(
            copy_examples(folder.expanduser())
            if folder is not None
            else examples_folder() or "none in this installation"
        )
    except OSError as error:
        raise ServerConfigError(str(error)) from error
