"""Tokenize with the five real tokenizers: exact bytes whatever the text, the ids of the tokenizer called directly, transformers' own prompts."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest

from teacher_server.backends.tokenizer import load_tokenizer, tokenizer_files
from teacher_server.tokenizing.process import TokenizerProcess
from teacher_server.tokenizing.rows import table_of
from teacher_wire.tokenizing.messages import TextRow
from teacher_wire.vocabulary.byte_table import END, TEXT

FOLDERS = {
    "smollm2": "smollm2",
    "qwen3": "tokenizers/qwen3",
    "llama3_1": "tokenizers/llama3_1",
    "gemma3": "tokenizers/gemma3",
    "deepseek_v3": "tokenizers/deepseek_v3",
}
ENDS = {
    "smollm2": "<|im_end|>", "qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
}  # fmt: skip
TEXTS = [
    "你好，世界。漢字かな交じり文、한국어도", "🤖👩‍👩‍👧 and 🇩🇪 ☃️", "a\r\nb\r\n\r\n  c\r", "   leading", " one", "\n\nthe\n", "\t\ttabs\t",
    "1234567 and 3.14159, 007, ١٢٣", "def f(x):\n    return x ** 2  # é à ü ß\n\n\nclass A: pass\n", "\x00\x01\x7f\xa0\ufeffx", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Ǆ ﬁ",
    "اَلْعَرَبِيَّةُ हिन्दी ไทย", "a" * 3000, " " * 300 + "x", "<0x41><0x0A>", "don't DON'T I'll", "",
]  # fmt: skip
CHANGED = {"qwen3": re.compile("[\u0300-\u036f\u0900-\u0fff\u0610-\u06ff]")}  # NFC moves marks
ASKED = [{"role": "user", "content": "What is 12 × 34?\r\n你好 🤖"}]


@pytest.fixture(scope="module", params=FOLDERS)
def teacher(request, real):
    folder = real / FOLDERS[request.param]
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} has no tokenizer.json")
    tokenizer = load_tokenizer(folder)
    files = tokenizer_files(tokenizer, len(tokenizer))
    process = TokenizerProcess(files)
    yield request.param, tokenizer, files, table_of(files), process
    process.close()


def fuzz(seed, count=200):
    """Texts of pieces of many scripts, breaks, digits and marks."""
    rng = random.Random(seed)
    pieces = [
        *"abcXYZ019 \n\t\r.,;()[]{}'\"-_=+",
        "the ",
        "return ",
        " 你",
        "好",
        "한",
        "🤖",
        "👩‍👩‍👧",
        "\r\n",
        "  ",
        "é",
        "ß",
        "—",
        "ñ",
        "ї",
        "1234",
        "\u2028",
        "\xa0",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(count)]


def test_the_ids_stand_for_exactly_the_text_and_are_the_tokenizers(teacher):
    name, tokenizer, files, table, process = teacher
    conversation = json.dumps({"messages": ASKED}).encode()
    texts = [*TEXTS, *fuzz(1)]
    alone = process.rows([TextRow(text.encode()) for text in texts])
    answers = process.rows([TextRow(text.encode(), conversation) for text in texts])
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert files.end == ENDS[name]
    checked = 0
    for text, lone, answer in zip(texts, alone, answers, strict=True):
        if lone.refused:
            assert name in CHANGED and CHANGED[name].search(text) and answer.refused, (text, lone.refused)
            continue
        assert table.text_of(lone.token_ids_T) == text.encode()
        direct = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert lone.token_ids_T.tolist() == direct, text
        assert answer.token_ids_T[: answer.prompt_tokens].tolist() == prompt_ids
        target = answer.token_ids_T[answer.prompt_tokens :]
        assert table.role_V[target[-1]] == END and tokenizer.convert_ids_to_tokens([int(target[-1])]) == [ENDS[name]]
        assert table.text_of(target) == text.encode() and (table.role_V[target[:-1]] == TEXT).all()
        np.testing.assert_array_equal(answer.byte_ends_C, table.ends_of(target))
        whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        if whole[: len(prompt_ids)] == prompt_ids:
            assert target[:-1].tolist() == whole[len(prompt_ids) :]
            checked += 1
    assert checked > 150


def test_every_token_of_the_vocabulary_stands_for_what_decoding_it_says(teacher):
    """The table against the tokenizer's own decoder: pairs of ids, since a decoder may drop a leading space."""
    _, tokenizer, _, table, _ = teacher
    rng = np.random.default_rng(0)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = [int(i) for i in rng.choice(np.flatnonzero(table.role_V == TEXT), 3000, replace=False)]
    decoded = tokenizer.backend_tokenizer.decode_batch([[*anchor, i] for i in ids], skip_special_tokens=False)
    for token_id, text in zip(ids, decoded, strict=True):
        assert text == b"".join([b"a", table.of(token_id)]).decode(errors="replace"), (token_id, table.of(token_id))


def test_a_byte_that_a_tokenizer_lacks_is_named(teacher):
    """SmolLM2 has no token for some control characters, and drops them from a text without a word."""
    name, _, _, table, process = teacher
    single = {table.of(int(i)) for i in np.flatnonzero(np.diff(table.ends_V1) == 1)}
    rows = [TextRow(b"a" + bytes([byte]) + b"b") for byte in range(128)]
    for row, answer in zip(rows, process.rows(rows), strict=True):
        assert bool(answer.refused) == (row.text[1:2] not in single), (name, row.text)
        assert not answer.refused or "at byte 1" in answer.refused
