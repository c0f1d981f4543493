"""Kinds of values that several sections of a config have: bounded numbers, and paths that know the home directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise ValueError(f"there is no such home directory: {error}") from error


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(_at_home(path)))


# `~` is the home directory wherever a path is read; and what a run writes stays where it was named, whoever changes directory.
HomePath = Annotated[Path, AfterValidator(_at_home)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
HomeText = Annotated[str, AfterValidator(lambda text: str(_at_home(Path(text))) if text.startswith("~") else text)]


def checked_tags(value: tuple[str, ...]) -> tuple[str, ...]:
    """Tags, each once and none empty.

    Raises:
        ValueError: naming the tag.
    """
    if "" in value:
        raise ValueError("a tag is a text that is not empty")
    if twice := [tag for place, tag in enumerate(value) if tag in value[:place]]:
        raise ValueError(f"the tag {twice[0]!r} is there twice")
    return value
