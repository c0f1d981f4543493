"""`python -m deploy.docs`: writes every generated page; with `--check` it only says which are old, with exit code 1 if any is."""

from __future__ import annotations

import argparse

from deploy.docs.pages import ROOT, wanted


def main() -> None:
    """See module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = [path for path, text in wanted().items() if not path.is_file() or path.read_text() != text]
    for path in old:
        print(f"{'old' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted()[path])
    raise SystemExit(1 if check and old else 0)


if __name__ == "__main__":
    main()
