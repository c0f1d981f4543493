"""What a command does not wait for: scikit-learn, which transformers imports where it is installed, for one function of assisted generation.

With SciPy and pandas that is up to 2 s of every command's start. For processes of ours alone: a library must not change what others see.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_ASKS, _UNUSED = "transformers.generation.candidate_generator", "sklearn"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing, but is asked first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _ASKS:
            _answer_no()
        return None


def leave_out_scikit_learn() -> None:
    """transformers will not import it in this process; whoever else wants it gets it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _answer_no() -> None:
    """Asks transformers whether it is there, while it is not; the answer is remembered."""
    if _UNUSED in sys.modules:
        return
    sys.modules[_UNUSED] = None  # type: ignore[assignment]  # "not to be found", in Python's own words
    try:
        with contextlib.suppress(ImportError):  # of a version that asks otherwise: then it is imported after all
            from transformers.utils import is_sklearn_available

            is_sklearn_available()
    finally:
        del sys.modules[_UNUSED]
