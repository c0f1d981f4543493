"""What the operator of a teacher server can get wrong; each is one line and exit code 2."""

from __future__ import annotations


class ServerConfigError(ValueError):
    """A setting is missing, misspelt, out of range or points nowhere; the text names it."""


class RayEndedError(RuntimeError):
    """A process of our own Ray cluster has ended: nothing is served any more, and nothing can be drained."""


class TakenOverError(RuntimeError):
    """Another `teacher-server up` has taken over the cluster that this one had left or seemed to have left."""
