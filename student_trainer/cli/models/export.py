"""`student-trainer export`: a trained student as others serve it. Loads no torch before it runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from student_trainer.cli.asking import progress_console
from student_trainer.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a finished run, an adapter or a model folder")],
    out: Annotated[Path, typer.Argument(help="folder to be made; must not exist")],
    format_: Annotated[str, typer.Option("--format", help="merged, awq, gguf or ollama")] = "merged",
    dtype: Annotated[str | None, typer.Option(help="of merged weights; as they were trained if not given")] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="rows or prompts that the proof asks about, and awq is calibrated on; the run's own if not given"
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many prompts are asked")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 32,
    calibration_rows: Annotated[int, typer.Option(min=1, help="rows that awq is calibrated on")] = 128,
    converter: Annotated[Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, or its folder")] = None,
    outtype: Annotated[str, typer.Option(help="gguf's weights: f32, f16, bf16 or q8_0")] = "bf16",
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, help="largest mean KL to the trained student, in nats; the format's if not given"),
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="smallest share of the same likeliest tokens")
    ] = None,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="keep a gguf file that cannot be read back and asked")
    ] = False,
) -> None:
    """Make a trained student ready to be served, and prove that it answers as before."""
    if format_ not in ("merged", "awq", "gguf", "ollama"):
        raise ConfigError(f"--format {format_}: choose merged, awq, gguf or ollama")
    if (max_kl is None) != (min_agreement is None):
        raise ConfigError("--max-kl and --min-agreement are one tolerance: set both, or neither")
    console = progress_console()
    from student_trainer.export.parity import Tolerance
    from student_trainer.export.run import Export, describe
    from student_trainer.export.run import export as run

    tolerance = None if max_kl is None or min_agreement is None else Tolerance(max_kl, min_agreement)
    asked = Export(
        source.expanduser(), out.expanduser(), format_, dtype, rows, prompts, max_new_tokens, calibration_rows,  # type: ignore[arg-type]
        None if converter is None else converter.expanduser(), outtype, tolerance, unproven,
    )  # fmt: skip
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a scheduler's word: nothing is left behind, as on Ctrl-C
    try:
        exported = run(asked, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was left behind")
        raise SystemExit(130) from None
    describe(exported, console)
