"""`student-trainer`: every command of a user's way, each in a file of its own that is read when it is called.

Exit codes: 0 done; 1 numbers of a run that are not finite (one line), or a fault of ours (a traceback); 2 something the user can mend
(one line says what and where); 3 one of several teachers is away, and the run can be resumed when it is back; 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from student_trainer.cli.table import Command, CommandTable

COMMANDS = (
    Command("train", "student_trainer.cli.train", "Train a student."),
    Command("label", "student_trainer.cli.label", "Ask for the labels of a run ahead of it; or let the teacher write."),
    Command("plan", "student_trainer.cli.plan", "Show what a run would do, without starting it."),
    Command("traces", "student_trainer.cli.traces", "Ask a teacher for reasoning traces, and verify them."),
    Command("compare", "student_trainer.cli.compare", "Train arms of one config with several seeds, and compare them."),
    Command("report", "student_trainer.cli.report", "Make one HTML page and Markdown of runs and comparisons."),
    Command("cache", "student_trainer.cli.cache", "Look after the labels on this machine's disk."),
)


class _Commands(CommandTable):
    table = COMMANDS


app = typer.Typer(
    cls=_Commands,
    help="Train a student on a served teacher's labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """The console script: one line and an exit code for what is known to go wrong."""
    from student_trainer.errors import StudentError
    from teacher_wire.core.errors import TeacherWireError

    try:
        app()
    except (StudentError, TeacherWireError) as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        print(f"student-trainer: {error}{f' ({notes})' if notes else ''}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from None
