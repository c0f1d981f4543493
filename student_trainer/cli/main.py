"""`student-trainer`: every command of a user's way, each in a file of its own that is read when it is called.

Exit codes: 0 done; 1 numbers of a run that are not finite (one line), or a fault of ours (a traceback); 2 something must be changed
(one line says what and where); 75 the same command may be tried again as it is: a teacher is away, too busy or too slow;
130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from student_trainer.cli.frame.table import Command, CommandTable

COMMANDS = (
    Command(
        "new", "student_trainer.cli.models.new", "Make a student from a teacher: fewer layers, or a smaller size.",
        (
            "student-trainer new students/half --from Qwen/Qwen2.5-7B-Instruct --layers 14",
            "student-trainer new students/half --from Qwen/Qwen2.5-7B-Instruct --layers 14 --by influence --sample rows.jsonl#64",
            "student-trainer new students/small --from Qwen/Qwen2.5-7B-Instruct --width 0.5b",
        ),
    ),
    Command(
        "plan", "student_trainer.cli.plan", "Show what a run would do, without starting it.",
        ("student-trainer plan student.yaml", "student-trainer plan student.yaml train.batch_size=4"),
    ),
    Command(
        "train", "student_trainer.cli.train", "Train a student.",
        (
            "student-trainer train student.yaml", "student-trainer train student.yaml train.max_steps=100 run.output_dir=runs/short",
            "student-trainer train --config student.yaml --set train.learning_rate=2e-5 --resume",
        ),
    ),
    Command(
        "label", "student_trainer.cli.label", "Ask for the labels of a run ahead of it; or let the teacher write.",
        ("student-trainer label student.yaml", "student-trainer label --generate student.yaml generate.output_dir=runs/answers"),
    ),
    Command(
        "traces", "student_trainer.cli.traces", "Ask a teacher for reasoning traces, and verify them.",
        ("student-trainer traces traces.yaml", "student-trainer traces traces.yaml sampling.samples=8 --resume"),
    ),
    Command(
        "evaluate", "student_trainer.cli.models.evaluate", "Measure a student before and after, and its teacher, in one table.",
        (
            "student-trainer evaluate runs/first --teacher localhost:50051",
            "student-trainer evaluate runs/first --tasks ceval-valid,gsm8k --limit 100",
            "student-trainer evaluate merged --before Qwen/Qwen2.5-0.5B --rows heldout.jsonl --tasks my_exam.csv",
        ),
    ),
    Command(
        "infer", "student_trainer.cli.models.infer", "Talk to a student, or answer a file of prompts.",
        (
            "student-trainer infer runs/first",
            "student-trainer infer --compare runs/first",
            "student-trainer infer --compare before=Qwen/Qwen2.5-0.5B-Instruct after=runs/first teacher=localhost:50051",
            "student-trainer infer runs/first --prompts questions.jsonl --out answers.jsonl",
        ),
    ),
    Command(
        "compare", "student_trainer.cli.results.compare", "Train arms of one config with several seeds, and compare them.",
        (
            "student-trainer compare run.yaml --arms sft gkd gkd+sft --seeds 3",
            'student-trainer compare run.yaml --arms sft --arm k8 "gkd labels.transport=top_k labels.k=8" --equal time --minutes 20',
        ),
    ),
    Command(
        "report", "student_trainer.cli.results.report", "One page of runs or comparisons: figures, curves, answers, cost.",
        (
            "student-trainer report runs/student-compare --evaluation evaluation.json --out report.html",
        ),
    ),
    Command(
        "export", "student_trainer.cli.models.export", "Merge, quantise or convert a student, and hold it against the trained one.",
        (
            "student-trainer export runs/mine exported/mine",
            "student-trainer export runs/mine exported/mine-awq --format awq",
            "student-trainer export runs/mine exported/mine-ollama --format ollama --converter ~/llama.cpp",
        ),
    ),
    Command(
        "cache", "student_trainer.cli.cache", "Look after the labels on this machine's disk.",
        ("student-trainer cache stats", "student-trainer cache prune --max-gb 20 --dry-run"),
    ),
    Command(
        "doctor", "student_trainer.cli.doctor", "Look what is wrong around a run, and how to mend it.",
        ("student-trainer doctor", "student-trainer doctor student.yaml --json"),
    ),
    Command(
        "check", "student_trainer.cli.configs.check", "Check a config, its files and this machine; ask nobody.",
        ("student-trainer check student.yaml", "student-trainer check student.yaml --json"),
    ),
    Command(
        "config", "student_trainer.cli.configs.config", "Show a resolved config, or the schema of all settings.",
        (
            "student-trainer config show student.yaml train.epochs=2", "student-trainer config schema > student.schema.json",
            "student-trainer config examples ~/lyceum",
        ),
    ),
)  # fmt: skip


class _Commands(CommandTable):
    table = COMMANDS


app = typer.Typer(
    cls=_Commands,
    help="Train a student on a served teacher's labels.",
    epilog="Examples:\n\nstudent-trainer plan student.yaml\n\nstudent-trainer train student.yaml train.max_steps=100\n\n"
    "student-trainer COMMAND --help shows more of each",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from teacher_wire import PROTOCOL, __version__

        print(f"student-trainer {__version__} (protocol {PROTOCOL})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and exit")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script: one line and an exit code for what is known to go wrong."""
    from student_trainer.cli.frame.imports import leave_out_scikit_learn
    from student_trainer.errors import StudentError, exit_code_of
    from teacher_wire.core.errors import TeacherWireError

    leave_out_scikit_learn()
    # It would say at every start of every command that an optional kernel for 4-bit weights on a CPU is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(prog_name="student-trainer")
    except (StudentError, TeacherWireError) as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        print(f"student-trainer: {error}{f' ({notes})' if notes else ''}", file=sys.stderr)
        raise SystemExit(exit_code_of(error)) from None
