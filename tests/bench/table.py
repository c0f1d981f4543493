"""What every bench shares: a table for people, and with --json one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table


def arguments(description: str) -> argparse.Namespace:
    """The options every bench takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    return parser.parse_args()


def seconds(function: Callable[[], object], repeat: int = 5) -> float:
    """Median wall time of `function`, after one call to warm up."""
    function()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def cpu_seconds(
    function: Callable[[], object], repeat: int = 15, clock: Callable[[], float] = time.thread_time
) -> tuple[float, float]:
    """CPU time of `function`, least and median of `repeat`, after one call to warm up; by `clock` this thread's alone."""
    function()
    times = []
    for _ in range(repeat):
        began = clock()
        function()
        times.append(clock() - began)
    return min(times), sorted(times)[len(times) // 2]


def show(title: str, rows: list[dict[str, object]], *, as_json: bool) -> None:
    """Prints `rows` (all with the same keys) as a table."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    if as_json:
        print(json.dumps({"title": title, "rows": rows}))
