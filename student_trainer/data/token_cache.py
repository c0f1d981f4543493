"""Tokenised rows on disk, so that a run that starts again does not tokenise what it has tokenised before.

In: sources, a tokenizer and settings; out: the dataset that `build_dataset` makes of them, read from disk where an entry of the same
content is there. An entry is named by everything that decides the dataset: the bytes of the rows and the names that errors give
them, the tokenizer, the template, every setting, the code of this package and the versions of the libraries beneath it.
Must never give a dataset that `build_dataset` would not give: what cannot be proved the same is made anew. Rows of a hub id are
not kept, since only the hub knows whether they have changed.

Axes: B examples, T tokens of all examples one behind another, W of those that have weights; S examples that the teacher reads otherwise, T of its tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from student_trainer.data.dataset import Example, Overlength, Rendering, TokenizedDataset, build_dataset
from student_trainer.data.rows.intake import BadRow, Intake, SourceFacts
from student_trainer.data.rows.sources import DataSource, describes_itself, local_path
from student_trainer.data.teacher_view import TeacherView, Told
from student_trainer.data.text.clock import Clock
from student_trainer.data.text.templates import choose
from student_trainer.errors import DataError
from teacher_wire.labels.files import replacing

MAX_BYTES = 8 << 30  # of all entries; above it those that were not read for the longest time go first
_PARTIAL_S = 86_400  # a file that is still being written after a day has lost its writer
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow", "datasets")


class _NotKeptError(Exception):
    """The rows or the tokenizer have no name by content."""


@dataclass(frozen=True)
class _Entry:
    """A dataset, and what else building it leaves behind: facts of the sources, and whether the template asked for the day."""

    dataset: TokenizedDataset
    sources: tuple[SourceFacts, ...]
    asked: bool


class TokenCache:
    """A folder of entries, shared by all runs of a machine.

    Args:
        folder: made when the first entry is written.
        tell: called with a sentence that says what was damaged or could not be kept; the run goes on without it.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = print) -> None:
        self._folder = folder
        self._tell = tell

    def dataset(
        self,
        sources: Sequence[DataSource],
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        template_kwargs: Mapping[str, Any] | None,
        clock: Clock,
        intake: Intake,
        **settings: Any,
    ) -> TokenizedDataset:
        """What `build_dataset` gives for the same arguments; `clock` and `intake`, as yet unused, are left as it leaves them.

        Raises:
            DataError: as `build_dataset`; nothing that ends so is kept.
        """

        def build() -> TokenizedDataset:
            more: dict[str, Any] = {
                "template": template,
                "template_kwargs": template_kwargs,
                "clock": clock,
                "intake": intake,
            }
            return build_dataset(sources, tokenizer, **more, **settings)

        if intake.bad or intake.sources:
            return build()
        try:
            chosen = choose(template, tokenizer, kwargs=template_kwargs, clock=clock)
            readers = settings.get("readers")
            may_be_printed = any(map(clock.may_be_asked, chosen.sources)) or (readers is not None and readers.tells)
            day = (clock.day, clock.explicit) if may_be_printed else None
            asked = (
                template,
                template_kwargs,
                chosen.sources,
                day,
                clock.asked,
                intake.policy,
                sorted(settings.items()),
            )
            identity, contents = _identity(tokenizer), _contents(sources)
        except (OSError, DataError, _NotKeptError):
            return build()  # which says in its own order what is wrong, if anything is
        key = hashlib.sha256(repr((_code(), identity, asked, contents)).encode("utf-8", "surrogatepass")).hexdigest()
        path = self._folder / f"{key}.safetensors"
        if (entry := self._read(path, key)) is not None:
            clock.asked = entry.asked
            intake.bad += entry.dataset.bad_rows
            intake.sources += entry.sources
            return entry.dataset
        made = build()
        with contextlib.suppress(OSError, DataError, _NotKeptError):
            if _contents(sources) == contents:  # nobody wrote to them meanwhile
                self._keep(path, key, _Entry(made, tuple(intake.sources), clock.asked))
        return made

    def _read(self, path: Path, key: str) -> _Entry | None:
        if not path.is_file():
            return None
        try:
            entry = _load(path, key)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            self._tell(f"{path}: damaged, and made anew: {' '.join(str(error).split())[:200]}")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return entry

    def _keep(self, path: Path, key: str, entry: _Entry) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=False, shared=True) as partial:
                _save(partial, key, entry)
            self._prune(path)
        except (OSError, SafetensorError) as error:
            self._tell(f"{self._folder}: the tokenised rows cannot be kept: {' '.join(str(error).split())[:200]}")

    def _prune(self, newest: Path) -> None:
        for partial in self._folder.glob("*.partial"):
            with contextlib.suppress(OSError):
                if partial.stat().st_mtime < time.time() - _PARTIAL_S:
                    partial.unlink()
        found = []
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another run may have deleted it
                found.append((path != newest, -path.stat().st_mtime, path.stat().st_size, path))
        total = 0
        for older, _, size, path in sorted(found):
            total += size
            if older and total > MAX_BYTES:
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------- names


def _version(package: str) -> str:
    """Of an installed package; a package that is read only for some rows may be absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@cache
def _code() -> str:
    """Digest of what makes datasets: this package's files, and the versions of the libraries that it stands on."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)}\0".encode() + path.read_bytes())
    for name in _LIBRARIES:
        digest.update(f"{name}=={_version(name)}\0".encode())
    return digest.hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """All that decides which ids a text gets, and which of them are control tokens."""
    if not tokenizer.is_fast:
        raise _NotKeptError
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()  # as the encoder leaves it
    backend.no_padding()
    added = sorted((number, repr(token), token.special) for number, token in tokenizer.added_tokens_decoder.items())
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    written = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return type(tokenizer).__name__, written, sorted(tokenizer.special_tokens_map.items()), added, begins


def _contents(sources: Sequence[DataSource]) -> list[tuple[object, ...]]:
    """What each source is called and holds."""
    return [(source, list(_files(source))) for source in sources]


def _files(source: DataSource) -> Iterator[tuple[str, str]]:
    path = local_path(source.path)
    if path.is_file():
        yield "", _sha256(path)
    elif path.is_dir() and not describes_itself(path):
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield str(file.relative_to(path)), _sha256(file)
    else:
        raise _NotKeptError


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- files


def _save(path: Path, key: str, entry: _Entry) -> None:
    """
    Raises:
        _NotKeptError: a bad row or a variable of the template is none of JSON's values.
    """
    dataset, rendering = entry.dataset, entry.dataset.rendering
    assert rendering is not None
    examples = [item.example for item in dataset]
    facts = {
        "keys": [example.key for example in examples],
        "dropped": [list(row) for row in dataset.dropped],
        "rendering": asdict(rendering) | {"kwargs": dict(rendering.kwargs)},
        "bad": [asdict(row) for row in dataset.bad_rows],
        "sources": [
            asdict(facts) | {"unused": list(facts.unused), "fields": list(facts.fields)} for facts in entry.sources
        ],
        "asked": entry.asked,
    }
    if any(example.tags for example in examples):
        facts["tags"] = [list(example.tags) for example in examples]
    if any(example.trace_steps for example in examples):
        facts["trace_steps"] = [example.trace_steps for example in examples]
    if all(example.told is not None for example in examples):
        told = [example.told for example in examples if example.told is not None]
        facts["answer_starts"] = [one.answer_start for one in told]
        facts["told_bytes"] = [len(one.conversation) for one in told]
        facts["begin_with_space"] = [one.begins_with_space for one in told]
    if names := sorted({name for example in examples for name in example.views}):
        facts["views"] = names
    try:
        written = json.dumps(facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise _NotKeptError from error
    if json.loads(written) != facts:
        raise _NotKeptError
    weights = [example.weights for example in examples if example.weights is not None]
    seen = [(b, example.teacher) for b, example in enumerate(examples) if example.teacher is not None]
    views = (
        {
            "seen_by_teacher_S": np.array([b for b, _ in seen], np.int64),
            "teacher_tokens_S": np.array([view.token_ids.size for _, view in seen], np.int64),
            "teacher_ids_T": np.concatenate([view.token_ids for _, view in seen]),
            "teacher_mask_T": np.concatenate([view.loss_mask for _, view in seen]),
        }
        if seen
        else {}
    )
    views |= _views_by_name(examples)
    tensors = views | {
        "token_ids_T": np.concatenate([example.token_ids for example in examples]),
        "loss_mask_T": np.concatenate([example.loss_mask for example in examples]),
        "tokens_B": np.array([example.token_ids.size for example in examples], np.int64),
        "target_bytes_B": np.array([example.target_bytes for example in examples], np.int64),
        "weighted_B": np.array([example.weights is not None for example in examples], np.bool_),
        "weights_W": np.concatenate(weights) if weights else np.zeros(0, np.float32),
        "facts": np.frombuffer(written.encode(), np.uint8),
    }
    save_file(tensors, path, {"key": key, "sha256": _digest(tensors)})


def _load(path: Path, key: str) -> _Entry:
    """
    Raises:
        ValueError, LookupError, TypeError, SafetensorError: it is not what was written under this key.
    """
    with safe_open(path, "numpy") as file:
        told = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if told.get("key") != key or told.get("sha256") != _digest(tensors):
        raise ValueError("its content is not what its digest says")
    facts = json.loads(tensors["facts"].tobytes())
    stops_B = np.cumsum(tensors["tokens_B"])
    weight_stops_B = np.cumsum(tensors["tokens_B"] * tensors["weighted_B"])
    examples = []
    for b, (tokens, weighted) in enumerate(
        zip(tensors["tokens_B"].tolist(), tensors["weighted_B"].tolist(), strict=True)
    ):
        place = slice(stops_B[b] - tokens, stops_B[b])
        weights = tensors["weights_W"][weight_stops_B[b] - tokens : weight_stops_B[b]] if weighted else None
        target_bytes = int(tensors["target_bytes_B"][b])
        examples.append(
            Example(
                tensors["token_ids_T"][place], tensors["loss_mask_T"][place], target_bytes, facts["keys"][b], weights
            )
        )
    if "teacher_ids_T" in tensors:
        parts = np.cumsum(tensors["teacher_tokens_S"])[:-1]
        ids, masks = (np.split(tensors[name], parts) for name in ("teacher_ids_T", "teacher_mask_T"))
        for b, ids_L, mask_L in zip(tensors["seen_by_teacher_S"].tolist(), ids, masks, strict=True):
            examples[b] = replace(examples[b], teacher=TeacherView(ids_L, mask_L))
    if "trace_steps" in facts:
        examples = [replace(one, trace_steps=n) for one, n in zip(examples, facts["trace_steps"], strict=True)]
    examples = _with_readers(examples, facts, tensors)
    dropped = [Overlength(*row) for row in facts["dropped"]]
    bad = [BadRow(**row) for row in facts["bad"]]
    sources = tuple(
        SourceFacts(**{**row, "unused": tuple(row["unused"]), "fields": tuple(row["fields"])})
        for row in facts["sources"]
    )
    return _Entry(TokenizedDataset(examples, dropped, Rendering(**facts["rendering"]), bad), sources, facts["asked"])


def _views_by_name(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """What the examples hold for several teachers, as tensors: the views of teacher m of the names in their order, and what is told."""
    found = {}
    for m, name in enumerate(sorted({name for example in examples for name in example.views})):
        views = [example.views[name] for example in examples]  # who has a context is shown it in every row
        found[f"view_{m}_tokens_B"] = np.array([view.token_ids.size for view in views], np.int64)
        found[f"view_{m}_ids_T"] = np.concatenate([view.token_ids for view in views])
        found[f"view_{m}_mask_T"] = np.concatenate([view.loss_mask for view in views])
    if all(example.told is not None for example in examples):
        found["told"] = np.frombuffer(
            b"".join(example.told.conversation for example in examples if example.told), np.uint8
        )
    return found


def _with_readers(
    examples: list[Example], facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> list[Example]:
    """The examples with what `_views_by_name` and the facts keep of several teachers."""
    if "tags" in facts:
        examples = [replace(example, tags=tuple(tags)) for example, tags in zip(examples, facts["tags"], strict=True)]
    by_name = []
    for m, name in enumerate(facts.get("views", ())):
        parts = np.cumsum(tensors[f"view_{m}_tokens_B"])[:-1]
        ids, masks = (np.split(tensors[f"view_{m}_{what}_T"], parts) for what in ("ids", "mask"))
        by_name.append([(name, TeacherView(*pair)) for pair in zip(ids, masks, strict=True)])
    if by_name:
        examples = [
            replace(example, views=dict(views))
            for example, views in zip(examples, zip(*by_name, strict=True), strict=True)
        ]
    if "told" in tensors:
        stops = np.cumsum(facts["told_bytes"]).tolist()
        written = tensors["told"].tobytes()
        told = [
            Told(written[stop - size : stop], start, spaced)
            for stop, size, start, spaced in zip(
                stops, facts["told_bytes"], facts["answer_starts"], facts["begin_with_space"], strict=True
            )
        ]
        examples = [replace(example, told=one) for example, one in zip(examples, told, strict=True)]
    return examples


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data if tensors[name].size else b"")
    return digest.hexdigest()
