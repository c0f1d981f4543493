"""A doctor's lines as text and as JSON; the colours are the houses'."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from teacher_wire.diagnosis.check import Check


def is_well(checks: Sequence[Check]) -> bool:
    """Whether nothing is bad."""
    return all(check.state != "bad" for check in checks)


def summary(checks: Sequence[Check]) -> str:
    """One line."""
    counts = {state: sum(check.state == state for check in checks) for state in ("ok", "note", "bad")}
    return f"{counts['ok']} ok, {counts['note']} notes, {counts['bad']} bad"


def as_json(checks: Sequence[Check]) -> str:
    """One JSON object."""
    return json.dumps({"ok": is_well(checks), "checks": [asdict(check) for check in checks]})
