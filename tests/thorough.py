"""What `make test` takes of a product of cases: every value of every axis; the whole product is run by `make thorough`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def thorough(*values: Any, id: str | None = None) -> Any:
    """A case that only `make thorough` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.thorough)


def covering(*axes: Sequence[Any]) -> list[Any]:
    """Cases of a parametrised test: the whole product of the axes, of which `make test` runs a covering part.

    Its case number i takes value i of every axis, and an axis that is shorter than the longest begins again. So every value of
    every axis is run, and two axes whose lengths have no common factor meet in as many pairs as the longer one has values.
    """
    longest = max(map(len, axes))
    kept = {tuple(i % len(axis) for axis in axes) for i in range(longest)}
    places = itertools.product(*(range(len(axis)) for axis in axes))
    return [_case([axis[n] for axis, n in zip(axes, place, strict=True)], place in kept) for place in places]


def first(cases: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """Cases of one value each: those that `keep` names, and the others for `make thorough`."""
    return [_case([case], keep(case)) for case in cases]


def _case(values: list[Any], is_kept: bool) -> Any:
    return pytest.param(*values) if is_kept else thorough(*values)
