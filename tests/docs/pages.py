"""What the tests of the documentation share: its pages, their headings, links and code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """What a link may name behind `#`: headings as Markdown makes ids of them, and named places."""
    text = _FENCE.sub("", path.read_text())
    found = set(re.findall(r'<a id="([^"]+)"', text))
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        count = seen[slug] = seen.get(slug, -1) + 1
        found.add(slug if not count else f"{slug}_{count}")
    return found


def links(path: Path) -> Iterator[str]:
    """Targets of every link and picture."""
    yield from re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(path.read_text()))


def marked_blocks(path: Path, mark: str) -> list[str]:
    """Code blocks that stand directly below `<!-- ci: MARK -->`."""
    return re.findall(rf"<!-- ci: {mark} -->\n```\w+\n(.*?)```", path.read_text(), re.DOTALL)
