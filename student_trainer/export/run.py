"""`student-trainer export`: a trained student as others serve it, and the proof that it answers as before.

In: `Export`; out: a folder that is there only once the proof holds, with `export.json` (where it is from, figures, tolerances). An export that
does not hold is kept beside it, under another name, for a look.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.export import parity
from student_trainer.export.awq import check_awq, write_awq
from student_trainer.export.gguf import can_be_read_back, check_outtype, find_converter, read_facts, write_gguf
from student_trainer.export.merged import load_plain, load_trained, write_merged
from student_trainer.export.ollama.modelfile import make_modelfile, read_generation, stop_ids
from student_trainer.export.prompts import Rows
from student_trainer.export.trained import Trained, check_dtype, find_trained
from student_trainer.files import disk_trouble_named, sync_tree
from student_trainer.model import adapters
from student_trainer.model.limits import position_limit
from student_trainer.progress import ProgressBar, working

RECORD_NAME, GGUF_NAME, MODELFILE_NAME = "export.json", "model.gguf", "Modelfile"
Format = Literal["merged", "awq", "gguf", "ollama"]
FORMATS: tuple[Format, ...] = ("merged", "awq", "gguf", "ollama")
_VERSIONS = ("torch", "transformers", "peft", "llmcompressor", "compressed-tensors", "gguf")
_MOST_CONTEXT = 8192  # of num_ctx: Ollama reserves memory for all of it
_WEIGHTLESS = ("*.safetensors", "*.safetensors.index.json", "config.json")


@dataclass(frozen=True)
class Export:
    """What is asked for.

    Attributes:
        source: a run, an adapter or a model.
        out: folder to be made; must not exist, or be empty.
        format: one of `FORMATS`.
        dtype: of merged weights; None: as they were trained.
        rows: what the proof asks about, and AWQ is calibrated on; None: the run's own.
        prompts: how many prompts.
        max_new_tokens: of each answer.
        calibration_rows: of AWQ.
        converter: llama.cpp's script, for GGUF.
        outtype: of GGUF's weights.
        tolerance: in place of the format's own.
        unproven: keep a GGUF file of a family that cannot be read back here.
    """

    source: Path
    out: Path
    format: Format = "merged"
    dtype: str | None = None
    rows: str | None = None
    prompts: int = 8
    max_new_tokens: int = 32
    calibration_rows: int = 128
    converter: Path | None = None
    outtype: str = "bf16"
    tolerance: parity.Tolerance | None = None
    unproven: bool = False


@dataclass(frozen=True)
class Exported:
    """What was made: its folder, the figures (None where nothing could be asked), what should be known, and how it is served."""

    folder: Path
    parity: parity.Parity | None
    notes: tuple[str, ...]
    serve: str


def export(asked: Export, console: Console) -> Exported:
    """Makes and proves an export.

    Raises:
        ConfigError: options that do not go together, or no converter.
        ModelError: a model that cannot be loaded, merged, quantised, converted or written as a Modelfile.
        DataError: rows that cannot be read.
        RunError: the folder exists, the run has no result, or the export does not answer as the trained student.
    """
    trained = find_trained(asked.source)
    _check(asked)
    converter = find_converter(asked.converter) if asked.format in ("gguf", "ollama") else None
    transformers_logging.disable_progress_bar()
    dtype = asked.dtype or trained.dtype
    tokenizer, generation = _tokenizer(trained)
    rows = Rows(tokenizer, asked.rows, trained.data)
    calibration = rows.whole(asked.calibration_rows) if asked.format == "awq" else []
    with _folder(asked.out) as folder:
        with working(console, "loading the trained student"):
            model, student = load_trained(trained)
        positions = position_limit(model.config.get_text_config())
        prompts = rows.prompts(asked.prompts, None if positions is None else positions - asked.max_new_tokens)
        with ProgressBar(console, "the trained student answers", len(prompts)) as bar:
            answered = parity.answer(model, prompts, asked.max_new_tokens, stop_ids(tokenizer, generation), bar.update)
        notes = rows.notes
        merged = folder if asked.format == "merged" else folder / ".merged"
        with working(console, "merging" if trained.is_adapter else "copying"):
            merged.mkdir(exist_ok=True)
            write_merged(trained, student, merged, dtype)
        del model, student
        gc.collect()
        torch.cuda.empty_cache()
        where: dict[str, Any] = {}
        if asked.format == "awq":
            with working(console, f"quantising, calibrated on {len(calibration)} rows"):
                write_awq(merged, folder, calibration)
            _copy_rest(merged, folder)
        elif converter is not None:
            notes += _gguf(asked, trained, merged, folder, converter, tokenizer, generation, positions, console)
            where = {"gguf_file": GGUF_NAME, "dtype": torch.float32}
        if merged != folder:
            shutil.rmtree(merged)
        found = None
        if converter is None or can_be_read_back(read_facts(folder / GGUF_NAME).architecture):
            tolerance = asked.tolerance or _tolerance(asked, dtype, trained)
            with ProgressBar(console, "the export is asked the same", len(prompts)) as bar:
                found = parity.compare(load_plain(folder, **where), answered, tolerance, bar.update)
        _record(folder, asked, trained, dtype, rows.told, found, notes)
        if found is not None and not found.holds:
            kept = _keep_failed(folder, asked.out)
            raise RunError(
                f"{asked.out}: the export does not answer as the trained student, so it is not done: {found.told}; it is kept as {kept} for a look"
            )
    return Exported(asked.out, found, tuple(notes), _serve(asked, positions))


def _check(asked: Export) -> None:
    """What is wrong with the options, before anything is loaded."""
    if asked.out.exists() and not (asked.out.is_dir() and not any(asked.out.iterdir())):
        raise RunError(f"{asked.out}: exists already and is not empty; choose another folder, or take it away first")
    check_dtype(asked.dtype)
    check_outtype(asked.outtype)
    is_gguf = asked.format in ("gguf", "ollama")
    if not is_gguf and (asked.converter is not None or asked.unproven or asked.outtype != "bf16"):
        raise ConfigError(
            f"--converter, --outtype and --unproven are of --format gguf and ollama, not of {asked.format}: leave them out"
        )
    if asked.format == "awq":
        check_awq()


def _tokenizer(trained: Trained) -> tuple[Any, dict[str, Any]]:
    sources = adapters.find(trained.settings)
    try:
        tokenizer = load_tokenizer(sources.tokenizer, revision=sources.tokenizer_revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{trained.name}: its tokenizer cannot be loaded: {str(error)[:300]}") from error
    return tokenizer, read_generation(trained.folder) or read_generation(Path(sources.model))


def _tolerance(asked: Export, dtype: str, trained: Trained) -> parity.Tolerance:
    """By what rounds the weights once more."""
    if asked.format == "awq":
        return parity.FOUR
    if asked.format in ("gguf", "ollama") and asked.outtype != "f32":
        return parity.EIGHT if asked.outtype == "q8_0" else parity.SIXTEEN
    rounded = dtype != "float32" and (trained.is_adapter or dtype != trained.dtype)
    return parity.SIXTEEN if rounded or (trained.dtype != "float32" and asked.format != "merged") else parity.EXACT


def _gguf(
    asked: Export, trained: Trained, merged: Path, folder: Path, converter: Path, tokenizer: Any, generation: dict[str, Any],
    positions: int | None, console: Console,
) -> list[str]:  # fmt: skip
    """Writes the file, and for Ollama its Modelfile; returns what should be known."""
    with working(console, f"converting by {converter}"):
        write_gguf(merged, folder / GGUF_NAME, converter, asked.outtype)
    facts = read_facts(folder / GGUF_NAME)
    if not can_be_read_back(facts.architecture) and not asked.unproven:
        raise ModelError(
            f"--format {asked.format}: transformers cannot read a GGUF file of {facts.architecture} back, so nothing shows that it answers as before; "
            "--unproven writes it all the same"
        )
    if asked.format == "gguf":
        return []
    context = None if positions is None else min(positions, _MOST_CONTEXT)
    data = trained.data
    trained_with: dict[str, Any] = {} if data is None else {"template": data.template, "kwargs": data.template_kwargs}
    made = make_modelfile(
        tokenizer, generation, GGUF_NAME, adds_bos=facts.adds_bos, context=context, name=trained.name, **trained_with
    )
    (folder / MODELFILE_NAME).write_text(made.text, encoding="utf-8")
    return [
        f"TEMPLATE renders as the chat template on {made.translated.proved_on} conversations; an answer ends at {', '.join(made.stops)}",
        *made.translated.notes,
    ]


def _copy_rest(merged: Path, folder: Path) -> None:
    """Tokenizer, template, generation config: what is no weight and no config of weights."""
    for path in merged.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif not any(path.match(pattern) for pattern in _WEIGHTLESS):
            shutil.copyfile(path, folder / path.name)


def _record(
    folder: Path, asked: Export, trained: Trained, dtype: str, rows: str, found: parity.Parity | None, notes: list[str]
) -> None:
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    facts = {
        "format": 1,
        "source": str(asked.source.absolute()),
        "kind": asked.format,
        "merged_adapter": trained.is_adapter,
        "weights": asked.outtype if asked.format in ("gguf", "ollama") else "int4" if asked.format == "awq" else dtype,
        "asked_about": rows,
        "parity": None if found is None else found.as_dict(),
        "notes": notes,
        "versions": versions,
    }
    (folder / RECORD_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _serve(asked: Export, positions: int | None) -> str:
    folder, name = shlex.quote(str(asked.out)), shlex.quote(asked.out.absolute().name)
    if asked.format == "ollama":
        return f"ollama create {name} -f {folder}/{MODELFILE_NAME} && ollama run {name}"
    if asked.format == "gguf":
        return f"llama-server -m {folder}/{GGUF_NAME}"
    length = f" --max-model-len {positions}" if positions is not None else ""
    return f"vllm serve {folder} --served-model-name {name}{length}"


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the block; nothing is left of it if the block fails or is interrupted."""
    partial = out.parent / f".{out.name}.unfinished"
    with disk_trouble_named(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            if out.exists():
                out.rmdir()  # an empty one
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _keep_failed(folder: Path, out: Path) -> Path:
    kept = out.parent / f"{out.name}.failed"
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    return kept


def describe(exported: Exported, console: Console) -> None:
    """Prints what was made."""
    for note in exported.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    if exported.parity is not None:
        console.print(escape(exported.parity.told))
        console.print(f"[bold green]done[/] {escape(str(exported.folder))}")
    else:
        console.print(f"[bold yellow]written, unproven[/] {escape(str(exported.folder))}")
    console.print(f"  {exported.serve}", markup=False)
