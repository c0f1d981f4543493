from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.demo.corpus import (
    CorpusConfig,
    Function,
    build_corpus,
    collect,
    functions_of,
    is_heldout,
    row,
    train_tokenizer,
)
from deploy.demo.models import ModelSize, write_model

FUNCTION = '''
@property
def area{n}(self, width, height):
    """The area of é {n}."""
    if width < 0:
        raise ValueError("width")
    return width * height * {n}
'''


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for i in range(60):
        folder = root / ("pkg" if i % 2 else "test" if i % 10 == 4 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"m{i}.py").write_text(FUNCTION.format(n=i) + FUNCTION.format(n="_twin"), encoding="utf-8")
    (root / "broken.py").write_text("def f(:\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    return root


CONFIG = CorpusConfig(min_bytes=60, max_bytes=400, heldout_percent=30)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_split_is_by_file_without_a_text_on_both_sides(stdlib: Path) -> None:
    found, left_out = collect(stdlib, CONFIG)
    files = {split: {f.file for f in functions} for split, functions in found.items()}
    texts = {split: {f.text for f in functions} for split, functions in found.items()}
    assert found["train"] and found["heldout"]
    assert not files["train"] & files["heldout"] and not texts["train"] & texts["heldout"]
    assert all(is_heldout(f, 30) for f in files["heldout"]) and not any(is_heldout(f, 30) for f in files["train"])
    assert not any(f.startswith("test/") for f in files["train"] | files["heldout"])
    taken = len(found["train"]) + len(found["heldout"])
    assert left_out == {"unparsable_files": 2, "wrong_size": 0, "duplicates": taken - 2}  # the twin is kept once
    assert [f.sha256 for f in found["train"]] == sorted(f.sha256 for f in found["train"])


def test_corpus_is_the_same_on_every_run_and_counted(stdlib: Path, tmp_path: Path) -> None:
    first = build_corpus(tmp_path / "a", CONFIG, stdlib=stdlib)
    assert first == build_corpus(tmp_path / "b", CONFIG, stdlib=stdlib)
    for name in ("train.jsonl", "heldout.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"train.jsonl", "heldout.jsonl", "manifest.json"}
    assert json.loads((tmp_path / "a" / "manifest.json").read_text()) == first
    assert first["train"]["rows"] == len(read(tmp_path / "a" / "train.jsonl"))


def test_rows_split_at_a_line_boundary_near_the_middle(stdlib: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path / "a", CONFIG, stdlib=stdlib)
    for fields in read(tmp_path / "a" / "train.jsonl"):
        assert set(fields) == {"instruction", "input", "output"}
        assert fields["input"].endswith("\n") and fields["output"] and not fields["output"].endswith("\n")
        assert (fields["input"] + fields["output"]).startswith("@property\ndef area")
    assert row(Function("f", 1, "aa\nbbbb\ncc\nd")) == {
        "instruction": "Complete the function.",
        "input": "aa\nbbbb\n",
        "output": "cc\nd",
    }


def test_methods_are_taken_and_inner_functions_are_not() -> None:
    method = "class A:\n    def m(self):\n        def inner():\n            pass\n        return inner\n"
    source = method + "async def f():\n    pass\n"
    found = {f.text.splitlines()[0]: f.line for f in functions_of("a.py", source)}
    assert found == {"def m(self):": 2, "async def f():": 6}


def test_empty_split_is_refused(stdlib: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no function for the heldout split"):
        build_corpus(tmp_path / "a", CorpusConfig(min_bytes=60, heldout_percent=0), stdlib=stdlib)


def test_tokenizer_and_model_folders_load(stdlib: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    build_corpus(tmp_path, CONFIG, stdlib=stdlib)
    train_tokenizer(tmp_path / "train.jsonl", tmp_path / "tokenizer", vocab_size=320)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(tokenizer) <= 320
    text = "    return 'é😀'\r\n\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "a"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\na<|im_end|><|im_start|>assistant\n"

    size = ModelSize(hidden_size=32, layers=1, heads=2, kv_heads=1, ffn_size=48, init_std=0.05)
    state = torch.random.get_rng_state()
    parameters = write_model(tmp_path / "m0", tmp_path / "tokenizer", size, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, seed in (("same", 0), ("other", 1)):
        write_model(tmp_path / name, tmp_path / "tokenizer", size, seed)
    weights = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in ("m0", "same", "other")}
    assert weights["m0"] == weights["same"] != weights["other"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m0")
    assert model.num_parameters() == parameters and model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.vocab_size == len(tokenizer)
    assert not list(tmp_path.glob("*.partial"))


def test_a_tokenizer_folder_and_a_model_folder_make_the_same_ids(tmp_path):
    """transformers picks a class by the model's type: a teacher trained on other ids than it is asked about teaches nonsense."""
    import json

    from transformers import AutoTokenizer

    from deploy.demo.models import ModelSize, write_model

    rows = tmp_path / "train.jsonl"
    code = "def run(self, x=10):\n    if x > 2_000:\n        return [f'{y!r}' for y in self.items() if y != 'it\u0301']\n\n    # done\n"
    rows.write_text(json.dumps({"instruction": "Go.", "input": code, "output": code * 2}) + "\n")
    train_tokenizer(rows, tmp_path / "tokenizer", vocab_size=300)
    write_model(tmp_path / "model", tmp_path / "tokenizer", ModelSize(8, 1, 2, 1, 8, 0.02), seed=0)
    alone, beside = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "model"))
    for text in (code, "    x = 1\n\n\n    y='\u65e5\u672c'", "don't 12345 \U0001f600\r\n"):
        assert alone(text)["input_ids"] == beside(text)["input_ids"]
