"""Every file that is generated, in whole or between markers, as it should be.

In: the repository; out: a dict of path -> text. Writes nothing.
"""

from __future__ import annotations

from pathlib import Path

from deploy.docs.commands import command_page
from deploy.docs.errors import error_page
from deploy.docs.examples import example_page
from deploy.docs.numbers import filled
from deploy.docs.settings import PAGES, settings_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROTO = ROOT / "proto" / "teacher_wire" / "v2" / "teacher.proto"
_PROTO = """# teacher.proto

<!-- Made by `make reference` from proto/teacher_wire/v2/teacher.proto. -->

The specification of the [wire protocol](wire.md); in an installation it lies in the package `teacher_wire.v2`.

"""


def wanted() -> dict[Path, str]:
    """Path of each generated file -> its text. A page with numbers between markers is itself with these numbers anew."""
    reference = DOCS / "reference"
    pages = {reference / f"{name}.md": settings_page(page) for name, page in PAGES.items()}
    pages[reference / "errors.md"] = error_page()
    pages[reference / "examples.md"] = example_page()
    pages[reference / "proto.md"] = f"{_PROTO}```protobuf\n{PROTO.read_text().rstrip()}\n```\n"
    pages[reference / "cli.md"] = command_page()
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = pages.get(path, path.read_text())
        if "<!-- number:" in text or "<!-- table:" in text:
            pages[path] = filled(text, path)
    return pages
