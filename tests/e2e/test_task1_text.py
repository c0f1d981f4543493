"""Task 1 as text: both alphabets write the same language, and the measure is 0 for the truth alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.e2e import task1_text
from tests.e2e.task1 import LANGUAGE, SYMBOLS, examples
from tests.e2e.task1_text import CHARACTERS, HALVES, LETTERS, MERGED, fresh_texts, kl_to_truth, of_half, texts


def test_both_alphabets_write_the_same_texts():
    written = texts(LANGUAGE.sample(50, 7, 7))
    for alphabet in (LETTERS, MERGED):
        ids = [alphabet.tokenizer(text).input_ids for text in written]
        assert [alphabet.tokenizer.decode(row) for row in ids] == written
        assert len(alphabet.tokenizer) == alphabet.vocab
        chat = [{"role": "user", "content": "3"}, {"role": "assistant", "content": "abc"}]
        assert alphabet.tokenizer.apply_chat_template(chat, tokenize=False) == f"3abc{alphabet.end}"
    assert all(len(LETTERS.tokenizer(text).input_ids) == len(text) == 33 for text in written)
    lengths = [len(MERGED.tokenizer(text).input_ids) for text in written]
    assert min(lengths) < 33 and np.mean(lengths) > 28  # some letters are merged, most are not
    own = MERGED.tokenizer.convert_tokens_to_ids(list(CHARACTERS))
    assert own != LETTERS.tokenizer.convert_tokens_to_ids(list(CHARACTERS))


@pytest.mark.parametrize("alphabet", [LETTERS, MERGED], ids=lambda alphabet: alphabet.name)
def test_a_batch_for_a_teacher_is_of_its_half_and_learns_all_but_topic_and_padding(alphabet):
    ids_BT, mask_BT = fresh_texts(alphabet, HALVES["second"], 16)(3)
    for ids_T, mask_T, text in zip(ids_BT, mask_BT, texts(of_half(HALVES["second"], 16, 12, 4, 3)), strict=True):
        assert text[0] in "4567"
        assert alphabet.tokenizer.decode(ids_T[mask_T]) == text[1:] + alphabet.end


def test_the_measure_is_zero_for_the_truth_and_names_the_half_that_is_not_known():
    id_of = np.array(LETTERS.tokenizer.convert_tokens_to_ids(list(CHARACTERS)))
    symbol_of = np.full(LETTERS.vocab, -1)
    symbol_of[id_of] = np.arange(len(CHARACTERS))

    def model(knows):
        def forward(input_ids):
            ids_BL = symbol_of[input_ids.numpy()]
            logits_BLV = torch.full((*ids_BL.shape, LETTERS.vocab), -1e9, dtype=torch.float64)
            truth_BLS = LANGUAGE.truth(ids_BL).log()
            known_B = np.isin(ids_BL[:, 0] - SYMBOLS, knows)
            truth_BLS[~known_B] = 0.0  # knows nothing but which letters there are
            logits_BLV[:, :-1, id_of[:SYMBOLS]] = truth_BLS
            return SimpleNamespace(logits=logits_BLV)

        return forward

    whole = kl_to_truth(model(range(8)))
    assert whole == pytest.approx({"union": 0, "first": 0, "second": 0}, abs=1e-9)
    half = kl_to_truth(model(HALVES["first"]))
    assert half["first"] == pytest.approx(0, abs=1e-9)
    assert half["second"] > 1 and half["union"] == pytest.approx(half["second"] / 2, rel=0.3)
    with pytest.raises(AssertionError, match="of every next letter"):
        kl_to_truth(model(range(8)), MERGED)


def test_rows_of_a_seed_are_the_sequences_of_task_1(tmp_path):
    written = task1_text.write_rows(tmp_path / "rows.jsonl", 3).read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row["prompt"] + row["completion"] for row in rows] == texts(np.stack([e.token_ids for e in examples(3)]))
    assert all((row["prompt"] in "0123") == (row["half"] == "first") for row in rows)
