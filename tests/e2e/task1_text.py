"""Task 1 of docs/concepts/method.md 12 as text, in two tokenizers, with teachers who know only half of its topics.

A sequence is written in 33 characters, a digit for the topic and a letter for each symbol, so that a run of the product reads it from rows like
any text. `LETTERS` has one token for every byte; `MERGED` has its ids in another order and 8 or more tokens of two and more letters, learned by BPE from the same language. The true
distribution of every next letter stays known: a student of `LETTERS` is measured by KL(truth | student) over the 32 symbols, which are
classes of one of its ids each.

Axes: B sequences, L = 33 characters, T tokens of a text with its end of turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.e2e.classroom import TeacherRecipe, teacher_folder
from tests.e2e.task1 import EVALUATED, FIXED, LANGUAGE, STUDENT, SYMBOLS, TEACHER, TOPICS

SYMBOL_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEF"
TOPIC_LETTERS = "01234567"
CHARACTERS = np.array(list(SYMBOL_LETTERS + TOPIC_LETTERS))
HALVES = {"first": range(TOPICS // 2), "second": range(TOPICS // 2, TOPICS)}
# Streams of numpy's generator beside those of task1.
_CORPUS, _ORDER, _HALF = 10, 11, 12
# With 257 ids and the usual 0.02 hard labels alone do not leave the plateau in 250 steps (KL 1.17); with this they come to the 0.31 of 40 ids.
INIT_STD = 0.05
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Alphabet:
    """A byte-level BPE over all 256 bytes, which merges across anything.

    Attributes:
        name: of folders.
        end: its end of turn.
        merges: tokens beside the bytes and the end.
        shuffled: whether ids are in an order of their own.
    """

    name: str
    end: str
    merges: int = 0
    shuffled: bool = False

    @property
    def vocab(self) -> int:
        return 256 + self.merges + 1

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        learned = Tokenizer(models.BPE())
        learned.pre_tokenizer = byte_level
        trainer = trainers.BpeTrainer(
            vocab_size=256 + self.merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        )  # fmt: skip
        corpus = texts(LANGUAGE.sample(2000, _CORPUS, 0)) if self.merges else ["a"]
        learned.train_from_iterator([text[1:] for text in corpus], trainer)
        model = json.loads(learned.to_str())["model"]
        words = sorted(model["vocab"], key=model["vocab"].__getitem__)
        places = np.random.default_rng([_ORDER, 0]).permutation(len(words)) if self.shuffled else range(len(words))
        vocab = {words[place]: number for number, place in enumerate(places)}
        made = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]]))
        made.pre_tokenizer, made.decoder = byte_level, decoders.ByteLevel()
        made.add_special_tokens([AddedToken(self.end, special=True, normalized=False)])
        found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=self.end, pad_token=self.end)
        found.chat_template = TEMPLATE
        return found

    def save(self, folder: Path, vocab: int) -> None:
        """Beside a model whose embeddings have `vocab` rows."""
        assert vocab == self.vocab == len(self.tokenizer)
        self.tokenizer.save_pretrained(folder)


LETTERS = Alphabet("letters", "<|end|>")
MERGED = Alphabet("merged", "<|fin|>", merges=8, shuffled=True)


def texts(ids_BL: np.ndarray) -> list[str]:
    """The sequences of task 1, topic first."""
    return ["".join(CHARACTERS[ids_L]) for ids_L in ids_BL]


def of_half(topics: range, count: int, *stream: int) -> np.ndarray:
    """int64 [count, 33], sequences of these topics alone."""
    ids_BL = LANGUAGE.sample(4 * count + 64, *stream)
    found_BL = ids_BL[np.isin(ids_BL[:, 0] - SYMBOLS, topics)][:count]
    assert len(found_BL) == count
    return found_BL


def fresh_texts(alphabet: Alphabet, topics: range, batch_size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches for a teacher: step -> ids [B, T] padded to the right, and which of them are learned."""

    def fresh(step: int) -> tuple[Tensor, Tensor]:
        written = texts(of_half(topics, batch_size, _HALF, topics.start, step))
        rows = [[*alphabet.tokenizer(text).input_ids, alphabet.tokenizer.eos_token_id] for text in written]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [alphabet.tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
        mask_BT = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
        mask_BT[:, 0] = False
        return ids_BT, mask_BT

    return fresh


def half_teacher(half: str, alphabet: Alphabet, steps: int = TEACHER.steps) -> Path:
    """The folder of a teacher who has read the topics of that half alone."""
    recipe = TeacherRecipe(
        f"task1-{half}-{alphabet.name}{alphabet.merges}-v1", replace(TEACHER.shape, vocab=alphabet.vocab), steps, TEACHER.batch_size
    )  # fmt: skip
    return teacher_folder(recipe, fresh_texts(alphabet, HALVES[half], TEACHER.batch_size), alphabet.save)


def student_folder(folder: Path, seed: int) -> Path:
    """A student of `LETTERS` at its start."""
    if not (folder / "config.json").is_file():
        replace(STUDENT.shape, vocab=LETTERS.vocab, init_std=INIT_STD).build(1000 + seed).save_pretrained(folder)
        LETTERS.save(folder, LETTERS.vocab)
    return folder


def write_rows(path: Path, seed: int, count: int = FIXED) -> Path:
    """The fixed sequences of a seed as rows of the product; the field `half` says whose topic it is."""
    ids_BL = LANGUAGE.sample(count, 2, seed)  # the stream of `task1.examples`
    rows = [
        {"prompt": text[0], "completion": text[1:], "half": "first" if topic in HALVES["first"] else "second"}
        for text, topic in zip(texts(ids_BL), ids_BL[:, 0] - SYMBOLS, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def kl_to_truth(model: Any, alphabet: Alphabet = LETTERS) -> dict[str, float]:
    """Mean KL(truth | model) in nats a symbol over fresh sequences of all topics (`union`) and of each half.

    Args:
        model: with one token a character.
        alphabet: its tokenizer, without merges.
    """
    assert not alphabet.merges, "the truth is known of every next letter, not of what is merged"
    ids_BL = LANGUAGE.sample(EVALUATED, 3, 0)  # the stream of `task1.kl_to_truth`
    id_of = np.array([alphabet.tokenizer.convert_tokens_to_ids(letter) for letter in CHARACTERS])
    p_BLS = LANGUAGE.truth(ids_BL)
    log_q_BLV = model(input_ids=torch.from_numpy(id_of[ids_BL])).logits[:, :-1].double().log_softmax(-1)
    kl_B = (p_BLS * (p_BLS.log() - log_q_BLV[..., id_of[:SYMBOLS]])).sum(-1).mean(-1)
    topic_B = torch.from_numpy(ids_BL[:, 0] - SYMBOLS)
    of_half_ = {half: float(kl_B[torch.isin(topic_B, torch.tensor(topics))].mean()) for half, topics in HALVES.items()}
    return {"union": float(kl_B.mean()), **of_half_}
