"""The text that a teacher's layers are calibrated on, as token ids.

In: a file of text or JSONL, or none; out: sequences of one length, the last of each text shorter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from teacher_server.config.features import FeaturesConfig
from teacher_server.errors import ServerConfigError

_PIECE_TOKENS, _SHORTEST = 512, 16
_CHARACTERS_A_TOKEN = 64  # no text has so many
_CHARACTERS_A_TOPIC = 4096


def token_ids(features: FeaturesConfig, tokenizer: Any, vocab_rows: int, longest: int) -> list[np.ndarray]:
    """int32 sequences of the sample.

    Args:
        features: which text, and how much of it.
        tokenizer: of the model.
        vocab_rows: an id above is taken for the last.
        longest: sequence that the model takes.

    Raises:
        ServerConfigError: the file cannot be read, is not UTF-8 or not JSONL, or holds no text.
    """
    size, left, sequences = min(_PIECE_TOKENS, longest), features.calibration_tokens, []
    for text in _texts(features):
        ids = np.minimum(np.array(tokenizer(text)["input_ids"], np.int32), vocab_rows - 1)
        for start in range(0, len(ids), size):
            piece = ids[start : start + min(size, left)]
            if len(piece) >= _SHORTEST:
                sequences.append(piece)
                left -= len(piece)
        if left < _SHORTEST:
            break
    if not sequences:
        raise ServerConfigError(f"features.calibration: {features.calibration} holds no text of {_SHORTEST} tokens")
    return sequences


def sha256(sequences: list[np.ndarray]) -> str:
    """Names a sample."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4").tobytes())
    return digest.hexdigest()


def _texts(features: FeaturesConfig) -> Iterator[str]:
    if features.calibration is None:
        yield from (text[:_CHARACTERS_A_TOPIC] for text in sorted(topics.values(), key=len, reverse=True))
        return
    path = features.calibration.expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix not in (".jsonl", ".ndjson"):
                yield file.read(_CHARACTERS_A_TOKEN * features.calibration_tokens)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield "\n".join(_strings(_parsed(line, path, number)))
    except OSError as error:
        raise ServerConfigError(f"features.calibration: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ServerConfigError(
            f"features.calibration: {path}: not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ServerConfigError(f"features.calibration: {path}, line {number}: not JSON: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    """Every text in a row, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
