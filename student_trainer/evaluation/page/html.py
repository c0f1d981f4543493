"""A report as one HTML page that asks nobody for anything: style, script and pictures are in it, and its own policy forbids the rest.

In: a `Report`; out: text of at most `MOST_BYTES` bytes. jinja2 escapes every string; the policy names style and script by their digests, so that
a script which came in with the data would not run even if an escape were missing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from student_trainer.errors import DataError
from student_trainer.evaluation.page.content import Report

MOST_BYTES = 5_000_000


@functools.cache
def _part(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_html(report: Report) -> str:
    """The page.

    Raises:
        DataError: it would be larger than `MOST_BYTES`.
    """
    # Without their last line end, as `<style>` and `<script>` hold them: the digests are of every byte between the tags.
    style, script = _part("page.css").strip(), _part("page.js").strip()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_part("page.html.jinja")).render(
        report=report,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
    )
    size = len(page.encode())
    if size > MOST_BYTES:
        raise DataError(
            f"the page would be {size / 1e6:.1f} MB, above {MOST_BYTES / 1e6:.0f} MB: report on fewer runs at a time"
        )
    return page
