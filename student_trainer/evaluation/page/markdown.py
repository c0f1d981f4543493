"""A report as Markdown: the tables of the page without its charts."""

from __future__ import annotations

from collections.abc import Sequence

from student_trainer.evaluation.page.content import Part, Report
from student_trainer.evaluation.page.figures import Cell, Table
from student_trainer.evaluation.page.text import Clipped, markdown_block, markdown_text


def as_markdown(report: Report) -> str:
    """The text; every string of the data is escaped or fenced."""
    lines = [f"# {markdown_text(report.title)}", ""]
    for part in report.parts:
        lines += _part(part, titled=len(report.parts) > 1)
    lines += _table(report.evaluated)
    if report.samples:
        lines += ["## Sample answers", ""]
    for number, sample in enumerate(report.samples, 1):
        lines += [f"### Sample {number}", "", *_block(sample.prompt)]
        for answer in sample.answers:
            lines += [f"**{markdown_text(answer.model)}**", "", *_block(answer.text)]
        if sample.reference is not None:
            lines += ["**reference**", "", *_block(sample.reference)]
    lines += [report.sample_note, ""] if report.sample_note else []
    return "\n".join(lines).rstrip() + "\n"


def _part(part: Part, *, titled: bool) -> list[str]:
    lines = [f"## {markdown_text(part.title)}", ""] if titled else []
    lines += [*(f"- {markdown_text(one)}" for one in part.reading), ""] if part.reading else []
    lines += [f"{part.done} of {part.runs} runs done; {part.budget} per run; seeds {part.seeds}.", ""]
    lines += [f"- **not done**: {markdown_text(state)}" for state in part.states]
    lines += [f"- {markdown_text(note)}" for note in part.notes]
    lines += [""] if part.states or part.notes else []
    tables = [part.arms, part.differences, part.evaluated, part.every, part.cost, part.settings]
    for table in tables if part.has_figures else [part.every, part.cost, part.settings]:
        lines += _table(table)
    if part.versions:
        told = ", ".join(f"{name} {value}" for name, value in part.versions)
        lines += ["## Versions", "", markdown_text(told), ""]
    if part.config.text:
        lines += ["## Config", "", *_block(part.config, "yaml")]
    return lines


def _table(table: Table | None) -> list[str]:
    if table is None:
        return []
    rows = [["---", *["---:"] * (len(table.header) - 1)], *([_cell(cell) for cell in row] for row in table.rows)]
    lines = [f"## {markdown_text(table.title)}", "", _row(list(map(markdown_text, table.header))), *map(_row, rows), ""]
    return lines + [line for note in table.notes for line in (markdown_text(note), "")]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell or " " for cell in cells) + " |"


def _cell(cell: Cell) -> str:
    return " ".join(markdown_text(text) for text in (cell.text, cell.hint) if text)


def _block(text: Clipped, language: str = "") -> list[str]:
    return [markdown_block(text.text, language), "", *([text.told, ""] if text.left_out else [])]
