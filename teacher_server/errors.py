"""What the operator of a teacher server can get wrong; each is one line and exit code 2."""

from __future__ import annotations


class ServerConfigError(ValueError):
    """A setting is missing, misspelt, out of range or points nowhere; the text names it."""
