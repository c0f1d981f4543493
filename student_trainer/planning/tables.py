"""A plan for people: its parts as tables and coloured text; and for programs, as one JSON object.

In: a `Plan`; out: what rich prints, or plain data. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from student_trainer.findings import Finding
from student_trainer.planning.coverage import TeacherCoverage
from student_trainer.planning.estimate.parts import Estimate
from student_trainer.planning.plan import Plan
from student_trainer.planning.samples import Sample
from student_trainer.planning.traffic import Traffic
from teacher_wire.core.info import TeacherInfo

_STYLES = {"supervised": "bold green", "context": "", "control": "yellow"}


def shown(made: Plan, console: Console) -> Iterator[RenderableType]:
    """Everything but the config and the verdict, in the order in which it is read."""
    coloured = console.is_terminal
    if made.rows is not None:
        yield from _rows(made)
    if made.samples:
        legend = "green: learned, yellow: control tokens" if coloured else "⟦learned⟧, ‹control tokens›"
        yield f"[bold]samples[/] ({legend})"
        for sample in made.samples:
            yield _headline(sample)
            yield coloured_sample(sample) if coloured else Text(sample.plain())
    for name, info in made.teachers.items():
        yield capabilities(name, info)
    if made.coverage:
        yield coverage_table(made.coverage)
        for taught in made.coverage:
            shares = ", ".join(f"{kind} {share:.1%}" for kind, share in taught.rows.kind_shares().items())
            yield f"groups of {escape(taught.name)} (student's tokens-teacher's): {shares or 'none'}"
    if made.memory is not None:
        yield memory_table(made.memory, made.card.name if made.card else "")
        yield _checkpointing(made.memory)
    if made.traffic:
        yield traffic_table(made.traffic)
    yield from _hours(made)
    for finding in made.findings:
        yield finding_line(finding)


def _rows(made: Plan) -> Iterator[str]:
    rows = made.rows
    assert rows is not None
    yield (
        f"[bold]rows[/] {rows.rows:,} with {rows.tokens:,} tokens, {rows.targets:,} of them learned, the longest {rows.longest:,}; "
        f"{rows.held_out:,} held out; {rows.steps:,} steps of {rows.micro_batches // max(1, rows.steps):,} micro-batches, {rows.epochs:.2g} epochs"
    )
    for count, named, what in (
        (rows.refused, rows.refused_first, "refused as bad"),
        (rows.overlong, rows.overlong_first, "left out as too long"),
    ):
        if count:
            more = ", ..." if count > len(named) else ""
            yield f"[yellow]{count:,} rows {what}[/]: {escape('; '.join(named))}{more}"


def _headline(sample: Sample) -> str:
    weights = f", weights {sample.weights[0]:g} to {sample.weights[1]:g}" if sample.weights else ""
    reader = "" if sample.reader == "student" else f" as teacher {escape(sample.reader)} reads it"
    return f"[dim]{escape(sample.key)}{reader}: {sample.tokens} tokens, {sample.supervised} learned{weights}[/]"


def coloured_sample(sample: Sample) -> Text:
    """Targets green, control tokens yellow; a special token that is a target is both bold and reversed."""
    text = Text()
    for piece in sample.pieces:
        text.append(
            piece.text, _STYLES[piece.role] + (" reverse" if piece.is_special and piece.role == "supervised" else "")
        )
    return text


def capabilities(name: str, info: TeacherInfo) -> Table:
    """What a teacher says of itself."""
    table = Table(title=f"teacher {escape(name)}", title_justify="left", show_header=False)
    limits = info.limits
    for what, value in (
        (
            "model",
            f"{info.model} ({info.architecture}, {info.dtype}, {info.layers} layers, width {info.hidden_size:,})",
        ),
        ("labels", ", ".join(info.transports)),
        ("writes", ", ".join(info.generates) or "nothing"),
        ("gives away", ", ".join(artifact.kind for artifact in info.artifacts) or "nothing"),
        (
            "limits",
            f"{limits.max_sequence_tokens:,} tokens a sequence, {limits.max_request_tokens:,} and {limits.max_request_sequences:,} "
            f"sequences a request, replies of {size(limits.max_reply_bytes)}",
        ),
        ("fingerprint", info.fingerprint[:16]),
    ):
        table.add_row(what, escape(value))
    return table


def coverage_table(coverage: tuple[TeacherCoverage, ...]) -> Table:
    """A column per teacher with another tokenizer."""
    table = Table(
        title="what teachers with another tokenizer can teach (docs/train/cross_tokenizer.md)", title_justify="left"
    )
    table.add_column("")
    for taught in coverage:
        table.add_column(escape(taught.name), justify="right")
    figures = [taught.figures() for taught in coverage]
    for name in figures[0]:
        values = [held[name] for held in figures]
        table.add_row(name, *(f"{value:.1%}" if isinstance(value, float) else f"{value:,}" for value in values))
    return table


def memory_table(memory: Estimate, where: str) -> Table:
    """Parts of the peak; those of another moment have no share of it."""
    table = Table(title=f"peak memory on {escape(where)}, estimated from shapes", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    for name, value in memory.parts.items():
        if value:
            table.add_row(name, size(value))
    table.add_section()
    table.add_row(f"in tensors at the peak ({memory.moment})", size(memory.in_use))
    table.add_row("held by torch", size(memory.held))
    table.add_row("[bold]on the card[/]", f"[bold]{size(memory.on_card)}[/]")
    return table


def _checkpointing(memory: Estimate) -> str:
    with_, without = size(memory.activations_with), size(memory.activations_without)
    return f"activations: {with_} with gradient checkpointing, {without} without"


def traffic_table(traffic: tuple[Traffic, ...]) -> Table:
    """A column per teacher."""
    table = Table(title="labels", title_justify="left")
    table.add_column("")
    for one in traffic:
        table.add_column(escape(one.name), justify="right")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    row("signals", [", ".join(one.kinds) for one in traffic])
    row("rows, supervised tokens", [f"{one.rows:,}, {one.targets:,}" for one in traffic])
    row("on the wire, one epoch", [size(one.epoch_bytes) for one in traffic])
    row("on the wire, this run", [size(one.run_bytes) for one in traffic])
    row("on disk, one epoch", [size(one.disk_bytes) if one.disk_bytes else "not kept" for one in traffic])
    row("on disk already", [f"{one.on_disk:.0%}" for one in traffic])
    row("fetched once (heads, bases)", [size(one.artifacts_bytes) for one in traffic])
    measured = [one.measured for one in traffic]
    row("requests measured", [str(one.requests) if one else "0" for one in measured])
    row("a micro-batch's answer, s", [f"{one.answer_s:.3f}" if one else "unknown" for one in measured])
    row("of it the teacher's passes, s", [f"{one.teacher_s:.3f}" if one else "unknown" for one in measured])
    row("tokens/s, one request at a time", [f"{one.tokens_per_s:,.0f}" if one else "unknown" for one in measured])
    return table


def _hours(made: Plan) -> Iterator[str]:
    if made.rows is None:
        return
    teachers, student = made.hours
    told = []
    if made.traffic:
        told.append(
            "unknown for the labels"
            if teachers is None
            else f"{duration(teachers)} for the labels, one request after another"
        )
    if student is None:
        told.append("unknown for the student's steps (--measure loads its weights and times some)")
    else:
        assert made.step is not None
        told.append(
            f"{duration(student)} for the student's steps ({made.step.micro_batch_s:.3f} s a micro-batch, {made.step.tokens_per_s:,.0f} tokens/s, "
            "without the teacher's head)"
        )
        if made.step.peak_bytes is not None:
            told.append(f"{size(made.step.peak_bytes)} in use at most in these")
    yield f"[bold]time[/] {'; '.join(told)}; labels are fetched ahead, so the longer of the two counts"


def finding_line(finding: Finding) -> str:
    """One finding, with its advice or what to change."""
    mark = "[red]bad [/]" if not finding.ok else "[yellow]note[/]" if finding.fix else "[green]ok  [/]"
    if finding.fix.startswith(finding.what):  # advice is a sentence of its own, as `train` prints it alone
        told = finding.fix
    else:
        told = finding.what + (f": {finding.fix}" if finding.fix and finding.fix not in finding.what else "")
    return f"{mark} {escape(finding.setting)}: {escape(told)}"


def size(value: float) -> str:
    """Bytes for people."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << power:
            return f"{value / (1 << power):,.2f} {unit}"
    return f"{value:,.0f} B"


def duration(hours: float) -> str:
    """Hours for people."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:,.1f} min" if hours * 60 >= 1 else f"{hours * 3600:,.1f} s"


def as_data(made: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """The plan as plain data for JSON; sizes in bytes, times in seconds or hours as named."""
    teachers, student = made.hours
    memory = None
    if made.memory is not None and made.card is not None:
        memory = asdict(made.memory) | {"on_card": made.memory.on_card, "card": asdict(made.card)}
    way = None if made.way_out is None else {"changes": made.way_out.changes, "on_card": made.way_out.estimate.on_card}
    return {
        "config": config,
        "can_start": made.can_start,
        "findings": [{"ok": one.ok, "setting": one.setting, "what": one.what, "fix": one.fix} for one in made.findings],
        "rows": None if made.rows is None else asdict(made.rows),
        "samples": [asdict(sample) for sample in made.samples],
        "teachers": {name: asdict(info) for name, info in made.teachers.items()},
        "coverage": {taught.name: taught.figures() for taught in made.coverage},
        "memory": memory,
        "over_budget": made.over_budget,
        "way_out": way,
        "traffic": [asdict(one) for one in made.traffic],
        "hours": {"teachers": teachers, "student": student},
        "step": None if made.step is None else asdict(made.step),
    }
