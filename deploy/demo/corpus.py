"""Real rows from the Python standard library's own source, and a small tokenizer trained on them.

In: the stdlib of the running interpreter. Out: train.jsonl, heldout.jsonl, manifest.json and a tokenizer folder.
Must never put one file, or one function's text, on both sides of the split, nor depend on the order of a file system.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

INSTRUCTION = "Complete the function."
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML without the newline between turns: every token of a template is paid for in every row.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class CorpusConfig:
    """Which functions are taken, and how they are divided.

    Attributes:
        min_bytes, max_bytes: bounds of a function's dedented source.
        min_lines: fewest lines of a function, so that both halves hold something.
        heldout_percent: share of the source *files* that goes to held-out.
    """

    min_bytes: int = 120
    max_bytes: int = 400
    min_lines: int = 4
    heldout_percent: int = 10


@dataclass(frozen=True)
class Function:
    """One function of the standard library.

    Attributes:
        file: path below the stdlib folder, with forward slashes.
        line: its first line (of the first decorator, if any), from 1.
        text: dedented source without a trailing newline.
    """

    file: str
    line: int
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def build_corpus(folder: Path, config: CorpusConfig | None = None, *, stdlib: Path | None = None) -> dict[str, object]:
    """Write train.jsonl, heldout.jsonl and, last, manifest.json into `folder`; the same bytes on every run.

    Returns:
        The manifest: python version, config, and rows, bytes and sha256 of each split, with what was left out and why.
    Raises:
        ValueError: a split would be empty.
    """
    config = config or CorpusConfig()
    found, left_out = collect(stdlib or Path(sysconfig.get_paths()["stdlib"]), config)
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {"python": platform.python_version(), "config": asdict(config), "left_out": left_out}
    for split, functions in found.items():
        if not functions:
            raise ValueError(f"no function for the {split} split of {config.min_bytes} to {config.max_bytes} bytes")
        data = "".join(json.dumps(row(f), ensure_ascii=False) + "\n" for f in functions).encode()
        _write_atomically(folder / f"{split}.jsonl", data)
        digest = hashlib.sha256(data).hexdigest()
        manifest[split] = {"rows": len(functions), "bytes": len(data), "sha256": digest}
    _write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def collect(stdlib: Path, config: CorpusConfig) -> tuple[dict[str, list[Function]], dict[str, int]]:
    """The functions of each split, ordered by the sha256 of their text, and the counts of what was left out.

    Train files are read first, so a text found on both sides stays in train: held-out is never seen in training.
    """
    files = {path.relative_to(stdlib).as_posix(): path for path in source_files(stdlib)}
    in_order = sorted(files, key=lambda name: (is_heldout(name, config.heldout_percent), name))
    found: dict[str, list[Function]] = {"train": [], "heldout": []}
    left_out = {"unparsable_files": 0, "wrong_size": 0, "duplicates": 0}
    seen: set[str] = set()
    for name in in_order:
        split = "heldout" if is_heldout(name, config.heldout_percent) else "train"
        try:
            functions = list(functions_of(name, files[name].read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):  # the stdlib carries a few files that are broken on purpose
            left_out["unparsable_files"] += 1
            continue
        for function in functions:
            lines = function.text.count("\n") + 1
            if not config.min_bytes <= len(function.text.encode()) <= config.max_bytes or lines < config.min_lines:
                left_out["wrong_size"] += 1
            elif function.sha256 in seen:
                left_out["duplicates"] += 1
            else:
                seen.add(function.sha256)
                found[split].append(function)
    return {split: sorted(fs, key=lambda f: f.sha256) for split, fs in found.items()}, left_out


def source_files(stdlib: Path) -> Iterator[Path]:
    """Every .py file below `stdlib` that is not a test or an installed package."""
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [s for s in subfolders if s not in SKIPPED_FOLDERS]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def is_heldout(name: str, percent: int) -> bool:
    """Whether the file `name` is held out: decided by its name alone, so a new Python moves no file."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < percent


def functions_of(name: str, source: str) -> Iterator[Function]:
    """Top-level functions and methods; not the functions inside them, whose text would be there twice."""
    lines = source.splitlines()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                yield Function(name, first, textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])))
            elif isinstance(node, ast.stmt):
                pending.append(node)


def row(function: Function) -> dict[str, str]:
    """The instruction/input/output row: split at the line boundary nearest to half of the bytes."""
    lines = function.text.splitlines(keepends=True)
    ends = [len("".join(lines[:i])) for i in range(1, len(lines))]
    cut = min(ends, key=lambda end: abs(end - len(function.text) / 2))
    return {"instruction": INSTRUCTION, "input": function.text[:cut], "output": function.text[cut:]}


def train_tokenizer(train_jsonl: Path, folder: Path, *, vocab_size: int = 1024) -> None:
    """Train a byte-level BPE on the rows of `train_jsonl` and save it as a transformers tokenizer folder.

    Special tokens: <|endoftext|> (padding), <|im_start|>, <|im_end|> (end of turn and eos). No BOS.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Beside a config.json of type qwen2, transformers replaces whatever tokenizer.json says by Qwen2's own normaliser and
    # word pattern. With exactly those, a tokenizer folder and a model folder make the same ids of a text.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(train_jsonl), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, additional_special_tokens=[TURN_START]
    )
    fast.chat_template = CHAT_TEMPLATE
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    fast.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _tokenizer_text(train_jsonl: Path) -> Iterable[str]:
    """The plain text between special tokens; the output apart from its header, as training and inference cut it."""
    with train_jsonl.open(encoding="utf-8") as lines:
        for line in lines:
            fields = json.loads(line)
            yield f"user\n{fields['instruction']}\n{fields['input']}"
            yield "assistant\n"
            yield fields["output"]


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
