"""Links of README and docs: what they name is there, and none leaves the repository but to papers and issues."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links

# Judged by their form: CI asks nobody.
_ELSEWHERE = re.compile(
    r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/10\.\S+|aclanthology\.org/\S+|github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+"
    r"|keepachangelog\.com\S*|semver\.org\S*)$"
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(path):
    dead = []
    for target in links(path):
        parts = urlsplit(target)
        if parts.scheme:
            dead += [target] * (_ELSEWHERE.match(target) is None)
            continue
        file = (path.parent / parts.path).resolve() if parts.path else path
        if not file.exists() or (parts.fragment and file.suffix == ".md" and parts.fragment not in anchors(file)):
            dead.append(target)
        elif DOCS in path.parents and DOCS not in file.parents:
            dead.append(f"{target}: outside of docs, so not on the site")
    assert dead == []


def test_pages_that_code_and_configs_name_are_there():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files = (
        [ROOT / name for name in tracked]
        if tracked
        else [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    )
    missing = set()
    for file in files:
        if (
            file.suffix not in (".py", ".md", ".yaml", ".yml", ".json", ".toml", ".sh", "")
            or not file.is_file()
            or file.stat().st_size > 1 << 20
        ):
            continue
        for name in re.findall(r"(?<![\w/.-])docs/[\w/-]+\.md", file.read_text(errors="replace")):
            if not (ROOT / name).is_file():
                missing.add(f"{file.relative_to(ROOT)}: {name}")
    assert missing == set()


def test_the_site_has_every_page_and_asks_nobody():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, list) else list(entry.values())
        return [page for value in values for page in pages(value)]

    named = pages(site["nav"])
    assert len(named) == len(set(named))
    assert {DOCS / name for name in named} == set(DOCS.rglob("*.md"))
    assert (
        site["theme"]["font"] is False
        and "plugins" not in site
        and "extra_javascript" not in site
        and "repo_url" not in site
    )
    for file in (DOCS / "assets").glob("*.*"):
        if file.suffix in (".css", ".svg"):
            text = file.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "http" not in text and "@import" not in text, file.name


def test_no_page_points_at_what_a_reader_has_not():
    absent = re.compile(r"\.\./shared|algorithms\.md|architecture\.md|ecosystem\.md|reliability\.md")
    assert [
        path.relative_to(ROOT).as_posix() for path in PAGES if path.name != "log.md" and absent.search(path.read_text())
    ] == []
    assert Path(ROOT / "docs" / "log.md").is_file()
