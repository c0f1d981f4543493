"""README answers a newcomer's questions in their order, on few lines."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text()


def test_it_is_short_and_in_order():
    assert len(README.splitlines()) < 220
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert headings == [
        "What you need", "Install", "A result in some minutes, without a GPU or a download", "Your data: Qwen2.5 7B into 1.5B", "Measured", "Compared",
        "For a group", "Status and limits", "Documentation", "Licence",
    ]  # fmt: skip


def test_its_first_screen_says_what_for_whom_why_and_how():
    first = "\n".join(README.splitlines()[:16])
    for word in ("distil", "picture.svg", "Use it if", "Do not use it"):
        assert word in first, word


def test_it_says_where_weights_are_random_and_what_was_not_measured():
    measured = README.partition("## Measured")[2].partition("## Compared")[0]
    rows = [line for line in measured.splitlines() if line.startswith("| ") and "`" in line and "tests.bench" in line]
    assert len(rows) >= 4 and "random weights" in measured and "Not measured" in measured
    assert "SmolLM2" in rows[0], "the real pair stands first"
