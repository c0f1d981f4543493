"""Ids and lengths that a model does not know are named before step 0, padding included; what it does know is let through."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.errors import DataError, ModelError
from student_trainer.model.limits import check_data, position_limit
from student_trainer.model.load import Outline


def outline(rows=300, positions=128, pad_id=0, eos_id=2, head_rows=None):
    tokenizer = SimpleNamespace(pad_token_id=pad_id, eos_token_id=eos_id, convert_ids_to_tokens=lambda i: f"<{i}>")
    return Outline(tokenizer, head_rows or rows, torch.device("cpu"), rows, positions)


def rows(*lengths, highest=299):
    examples = []
    for number, length in enumerate(lengths):
        ids = np.zeros(length, np.int32)
        ids[-1] = highest
        examples.append(Example(ids, np.ones(length, bool), 1, f"rows.jsonl:{number + 1}"))
    return TokenizedDataset(examples)


def test_what_fits_passes():
    check_data(outline(), "m", rows(2, 128), rows(5))
    check_data(outline(positions=None), "m", rows(2, 5000), None)
    check_data(outline(pad_id=None), "m", rows(2), None)  # padded with the end token


@pytest.mark.parametrize("highest", [300, 301, 100_000])
@pytest.mark.parametrize("where", ["train", "eval"])
def test_an_id_beyond_the_embedding_is_named_with_its_row(highest, where):
    bad, good = rows(4, 4, highest=highest), rows(4)
    with pytest.raises(
        ModelError, match=rf"data\.{where} rows\.jsonl:1 has token {highest} \('<{highest}>'\).*300 rows"
    ):
        check_data(outline(), "m", *((bad, good) if where == "train" else (good, bad)))


def test_a_head_shorter_than_the_embedding_counts_too():
    with pytest.raises(ModelError, match="299 rows"):
        check_data(outline(head_rows=299), "m", rows(4), None)


@pytest.mark.parametrize(("pad_id", "eos_id", "named"), [(300, 2, 300), (None, 301, 301)])
def test_padding_beyond_the_embedding_is_named(pad_id, eos_id, named):
    with pytest.raises(ModelError, match=f"pads with {named}"):
        check_data(outline(pad_id=pad_id, eos_id=eos_id), "m", rows(4), None)


@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_row_beyond_the_positions_is_named_with_setting_and_limit(where):
    long, short = rows(3, 129), rows(3)
    with pytest.raises(DataError, match=rf"data\.{where} rows\.jsonl:2: 129 tokens.*128.*data\.max_tokens=128"):
        check_data(outline(), "m", *((long, short) if where == "train" else (short, long)))


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("llama", {"max_position_embeddings": 2048}, 2048),
        ("gpt2", {"n_positions": 512}, 512),
        ("opt", {"max_position_embeddings": 256}, 256),
        ("qwen2", {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}}, 16_384),
        ("llama", {"max_position_embeddings": 131_072, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, 131_072),
        ("llama", {"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 2048),
        ("mamba", {}, None),
        ("bloom", {}, None),
        ("falcon", {"alibi": True, "max_position_embeddings": 64}, None),
    ],
    ids=["plain", "learned", "learned_2", "yarn", "llama3", "linear", "states", "alibi", "falcon_alibi"],
)  # fmt: skip
def test_the_limit_of_an_architecture(family, settings, limit):
    assert position_limit(AutoConfig.for_model(family, **settings)) == limit
