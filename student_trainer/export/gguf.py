"""GGUF by llama.cpp's own converter, where the user has it; what was written is read back and can be asked.

In: a merged folder; out: one file. Converting families is llama.cpp's work and changes weekly, so its script is run and not rebuilt.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.errors import ConfigError, ModelError

SCRIPT, OUTTYPES = "convert_hf_to_gguf.py", ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class GgufFacts:
    """What a file says of itself.

    Attributes:
        architecture: llama.cpp's name of the family.
        adds_bos: whether llama.cpp puts the BOS token in front of every prompt.
        eos_id: what ends an answer; None: it does not say.
    """

    architecture: str
    adds_bos: bool
    eos_id: int | None


def find_converter(given: Path | None) -> Path:
    """The converter: as given, on PATH, or in the folder that $LLAMA_CPP names.

    Raises:
        ConfigError: it is at none of these places.
    """
    if given is not None:
        found = given / SCRIPT if given.is_dir() else given
        if not found.is_file():
            raise ConfigError(f"--converter {given}: no such file; name llama.cpp's {SCRIPT}, or its folder")
        return found
    on_path, home = shutil.which(SCRIPT), os.environ.get("LLAMA_CPP")
    if on_path is not None:
        return Path(on_path)
    if home and (Path(home).expanduser() / SCRIPT).is_file():
        return Path(home).expanduser() / SCRIPT
    said = f"LLAMA_CPP={home} does not hold it" if home else "LLAMA_CPP is not set"
    raise ConfigError(
        f"--format gguf needs llama.cpp's {SCRIPT}: it is not on PATH, and {said}; git clone https://github.com/ggml-org/llama.cpp, then "
        "--converter PATH or LLAMA_CPP=FOLDER"
    )


def check_outtype(name: str) -> None:
    """Refuses what the converter does not write by itself.

    Raises:
        ConfigError: naming what it does.
    """
    if name not in OUTTYPES:
        raise ConfigError(
            f"--outtype {name}: choose {', '.join(OUTTYPES)}; smaller ones are made of the f16 file by llama.cpp's llama-quantize"
        )


def write_gguf(merged: Path, file: Path, converter: Path, outtype: str) -> None:
    """Runs the converter.

    Raises:
        ModelError: it fails; with its last words.
    """
    command = [sys.executable, str(converter), str(merged), "--outfile", str(file), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not file.is_file():
        words = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        raise ModelError(f"{converter.name} ended with {done.returncode}: {(words or ['without a word'])[-1][:300]}")


def read_facts(file: Path) -> GgufFacts:
    """What a GGUF file says.

    Raises:
        ModelError: it is none, or the package `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("--format gguf: the package gguf is not installed here: pip install gguf") from error
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{file}: is no GGUF file: {str(error)[:200]}") from error

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = str(value("general.architecture"))
    adds = value("tokenizer.ggml.add_bos_token")
    if adds is None:  # llama.cpp's own default: of SentencePiece vocabularies alone
        adds = value("tokenizer.ggml.model") == "llama"
    eos = value("tokenizer.ggml.eos_token_id")
    return GgufFacts(architecture, bool(adds), None if eos is None else int(eos))


def can_be_read_back(architecture: str) -> bool:
    """Whether transformers makes a model of such a file, so that it can be asked."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return architecture in GGUF_SUPPORTED_ARCHITECTURES
