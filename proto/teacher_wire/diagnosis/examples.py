"""Where the example configs of this installation are: in the wheel's own package, or in the checkout that is installed as it is."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

_PACKAGE = "lyceum_distill"  # data of the wheel alone; pyproject.toml puts deploy/examples there


def examples_folder() -> Path | None:
    """The folder, or None where neither a wheel nor a checkout holds one."""
    checkout = Path(__file__).parents[3] / "deploy" / "examples"
    if checkout.is_dir():
        return checkout
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((folder for place in places if (folder := Path(place) / "examples").is_dir()), None)


def copy_examples(target: Path) -> Path:
    """Copies the examples into `target/deploy/examples`, and the schemas that they name beside them; returns the copy.

    So they lie as in a checkout, and the commands of the pages hold from `target` on.

    Raises:
        FileNotFoundError: this installation has none.
        FileExistsError: something is there already.
    """
    source = examples_folder()
    if source is None:
        raise FileNotFoundError("this installation holds no example configs: install the wheel, or a checkout")
    copied = target / "deploy" / "examples"
    if copied.exists():
        raise FileExistsError(f"{copied} is there already: name another folder")
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    schema = source.parent / "schema"
    if schema.is_dir() and not (target / "deploy" / "schema").exists():
        shutil.copytree(schema, target / "deploy" / "schema")
    return copied
