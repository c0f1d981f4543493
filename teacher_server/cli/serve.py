"""The server itself as a command of its own (`cli/up.py`): `up` starts it in a session of its own, and nobody else does."""

from __future__ import annotations

from teacher_server.cli.up import serve_app as app

__all__ = ["app"]
