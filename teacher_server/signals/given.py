"""`given`: nothing beside lse and logp(label), which `reduce` makes of every row that is to be checked."""

from __future__ import annotations

from typing import ClassVar

from teacher_server.signals.base import Reduction
from teacher_wire.score.signals.given import Given


class GivenReduction(Reduction[Given]):
    """See module."""

    needs_logits: ClassVar[bool] = False
