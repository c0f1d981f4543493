"""Answers to token ids: prompts exactly as inference tokenises them, targets as the whole text is tokenised.

In: `Answer`s of conversations; out: sequences of ids, each with its supervised tokens. The rules (docs/data/templates.md):

1. The ids before a target are the tokenizer's ids of the prompt alone. A token is supervised iff it stands behind them and
   belongs to the target, so offsets inside a multi-byte character decide nothing.
2. The ids of the target are those of prompt and target as one text. Where that text is cut across the border ("assistant\\n" and
   "    return" merging), the prompt's ids stand, and the target is tokenised behind a neutral character.
3. Answers share one sequence if and only if each prompt, as inference tokenises it, begins with the ids so far.

Axes: L tokens of one sequence, M of its targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.data.text.answer import Answer, Template
from student_trainer.errors import DataError

_TAIL = 256  # characters at the end of a prompt in which a token is looked for that cuts every text
_NEUTRAL = (
    "\n.:a1 "  # characters to tokenise a target behind; the first that no merge of the tokenizer joins to it is taken
)


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence of ids with the answers it teaches.

    Attributes:
        token_ids: int32 [L].
        loss_mask: bool [L]; True at targets with a weight above 0.
        target_bytes: UTF-8 bytes of the row's own characters under the mask.
        weights: float32 [L]; None: 1 everywhere.
        turns: numbers of its answers' turns.
        starts: where each of its answers starts, in tokens.
        firsts: the first character of each.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    target_bytes: int
    weights: np.ndarray | None
    turns: tuple[int, ...]
    starts: tuple[int, ...] = ()
    firsts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Behind:
    """An answer behind its prompt: ids of the prompt, ids of the target, each target id's characters in the target, and whether
    the whole text would have merged across the border.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    spans: Sequence[tuple[int, int]]
    merged: bool

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.target_ids


class Encoder:
    """Makes ids of answers, many conversations a call.

    Attributes:
        border_merges: targets so far whose first token would have been merged with the prompt's last.
        parted: conversations so far whose answers could not share a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        if not tokenizer.is_fast:
            raise DataError("rows need a fast tokenizer (tokenizer.json)", field="tokenizer")
        self._template = template
        self._backend: Any = tokenizer.backend_tokenizer
        self._first = [int(tokenizer.bos_token_id)] if template.begins_with_bos else []
        self._cutting = _cutting(tokenizer)
        longest_first = sorted(self._cutting, key=len, reverse=True)
        self._cuts = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._neutral: dict[tuple[str, bool], list[int]] = {}
        self.border_merges = 0
        self.parted = 0

    def encode(self, conversations: Sequence[Sequence[Answer]], turns: str = "auto") -> list[list[TokenSequence]]:
        """The sequences of each conversation, in order.

        Args:
            conversations: the answers of each.
            turns: "auto": one sequence for all answers where the rules allow it, else one for each; "each"; "last": as "each", for
                templates that were asked for the last answer alone.
        """
        joint = [i for i, answers in enumerate(conversations) if turns == "auto" and len(answers) > 1]
        made: dict[int, list[TokenSequence]] = {}
        candidates = [i for i in joint if _extends(conversations[i])]
        found = self._tokenised(
            (answer, answer is conversations[i][-1]) for i in candidates for answer in conversations[i]
        )
        for i in candidates:
            if parts := self._together(conversations[i], found):
                made[i] = [self._sequence(parts)]
        self.parted += len(joint) - len(made)
        others = [i for i in range(len(conversations)) if i not in made]
        found = self._tokenised((answer, True) for i in others for answer in conversations[i])
        for i in others:
            made[i] = [self._sequence([(answer, self._behind(answer, found))]) for answer in conversations[i]]
        return [made[i] for i in range(len(conversations))]

    def prompts(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """The ids of `Template.prompt`s."""
        found = self._encode(texts)
        return [self._first + found[key].ids for key in texts]

    def _together(self, answers: Sequence[Answer], found: dict[Any, Any]) -> list[tuple[Answer, _Behind]]:
        """All answers in the last one's sequence; [] where the ids do not extend."""
        last = self._behind(answers[-1], found)
        whole = found[answers[-1].prompt + answers[-1].target + answers[-1].ending, answers[-1].literal]
        parts = []
        for i, answer in enumerate(answers[:-1]):
            prompt, text = self._prompt(answer, whole, found), answer.prompt + answer.target
            ids = self._up_to(text, whole) if not answer.literal else None
            if ids is None:  # the turn does not end with a token that cuts every text: ask the tokenizer
                ids = self._encode([(text, answer.literal)])[text, answer.literal].ids
            after = last.prompt_ids if i == len(answers) - 2 else self._prompt(answers[i + 1], whole, found)
            if ids[: len(prompt)] != prompt or after[: len(ids)] != ids:
                return []
            spans = _within(whole.offsets[len(prompt) : len(ids)], len(answer.prompt)) if answer.weights else ()
            parts.append((answer, _Behind(prompt, ids[len(prompt) :], spans, merged=False)))
        return [*parts, (answers[-1], last)]

    def _behind(self, answer: Answer, found: dict[Any, Any]) -> _Behind:
        """An answer that ends its sequence."""
        target = answer.target + answer.ending
        whole = found[answer.prompt + target, answer.literal]
        prompt = self._prompt(answer, whole, found)
        cut, before = len(prompt), len(answer.prompt)
        merged = whole.ids[:cut] != prompt
        if merged:
            whole, cut, before = self._alone(target, literal=answer.literal)
        spans = _within(whole.offsets[cut:], before) if answer.weights else ()
        return _Behind(prompt, whole.ids[cut:], spans, merged)

    def _prompt(self, answer: Answer, whole: Any, found: dict[Any, Any]) -> list[int]:
        """The ids of the answer's prompt alone; `whole` is the encoding of a text that begins with it."""
        anchor = self._anchor(answer)
        if anchor is not None:
            at, content = anchor
            token = whole.char_to_token(at)
            tail = found[answer.prompt[at:], False].ids
            is_there = token is not None and tuple(whole.token_to_chars(token) or ()) == (at, at + len(content))
            if is_there and tail[0] == self._cutting[content] == whole.ids[token]:
                return list(whole.ids[:token] + tail)
        key = answer.prompt, answer.literal
        if key not in found:
            found.update(self._encode([key]))
        return list(found[key].ids)

    def _anchor(self, answer: Answer) -> tuple[int, str] | None:
        """The last token in the prompt at which every text is cut: what stands before it does not change the ids behind it.

        So the prompt's ids are those of the whole text up to it, and from there those of the prompt's short tail alone.
        """
        last = None if answer.literal else self._last_cut(answer.prompt)
        return (last.start(), last.group()) if last else None

    def _last_cut(self, text: str) -> re.Match[str] | None:
        """The last token near the end of `text` at which every text is cut."""
        if self._cuts is None:
            return None
        return next(reversed(list(self._cuts.finditer(text, max(0, len(text) - _TAIL)))), None)

    def _up_to(self, text: str, whole: Any) -> list[int] | None:
        """The ids of `text`, with which the text of `whole` begins, if it ends with a token at which every text is cut."""
        last = self._last_cut(text)
        if last is None or last.end() != len(text):
            return None
        token = whole.char_to_token(last.start())
        if token is None or tuple(whole.token_to_chars(token) or ()) != last.span():
            return None
        return list(whole.ids[: token + 1])

    def _alone(self, target: str, *, literal: bool) -> tuple[Any, int, int]:
        """The encoding of `target` behind a neutral character, and how many ids and characters of it are that character's."""
        for character in _NEUTRAL:
            key = character, literal
            if key not in self._neutral:
                self._neutral[key] = self._encode([key])[key].ids
            before = self._neutral[key]
            whole = self._encode([(character + target, literal)])[character + target, literal]
            if whole.ids[: len(before)] == before:
                return whole, len(before), 1
        return self._encode([(target, literal)])[target, literal], 0, 0

    def _sequence(self, parts: list[tuple[Answer, _Behind]]) -> TokenSequence:
        ids = self._first + parts[-1][1].ids
        mask = np.zeros(len(ids), np.bool_)
        weights = np.ones(len(ids), np.float32) if any(answer.weights for answer, _ in parts) else None
        target_bytes, starts = 0, []
        for answer, behind in parts:
            self.border_merges += behind.merged
            start = len(self._first) + len(behind.prompt_ids)
            starts.append(start)
            stop = start + len(behind.target_ids)
            mask[start:stop] = True
            if answer.weights and weights is not None:
                length = len(answer.target) + len(answer.ending)
                weights[start:stop] = token_weights(behind.spans, answer.weights, length)
                mask[start:stop] = weights[start:stop] > 0  # nobody asks a teacher about what weighs nothing
                target_bytes += _bytes_under(answer, behind.spans, mask[start:stop])
            else:
                target_bytes += sum(len(answer.target[place.start : place.end].encode()) for place in answer.places)
        return TokenSequence(
            np.array(ids, np.int32), mask, target_bytes, weights, tuple(answer.turn for answer, _ in parts), tuple(starts),
            tuple(answer.target[:1] for answer, _ in parts),
        )  # fmt: skip

    def _tokenised(self, answers: Iterable[tuple[Answer, bool]]) -> dict[Any, Any]:
        """Encodings of what the answers need: the prompt's tail, or all of it, and for those that end a sequence the whole text."""
        texts: dict[tuple[str, bool], None] = {}
        for answer, ends in answers:
            anchor = self._anchor(answer)
            texts[(answer.prompt, answer.literal) if anchor is None else (answer.prompt[anchor[0] :], False)] = None
            if ends:
                texts[answer.prompt + answer.target + answer.ending, answer.literal] = None
        return self._encode(list(texts))

    def _encode(self, keys: Sequence[tuple[str, bool]]) -> dict[Any, Any]:
        """The tokenizer's `Encoding` of each text, by text and whether its control tokens are literal."""
        found: dict[Any, Any] = {}
        for literal in (False, True):
            some = [key for key in keys if key[1] is literal]
            if some:
                backend = self._template.control.literal_tokenizer if literal else self._backend
                backend.no_truncation()
                backend.no_padding()
                backend.encode_special_tokens = False
                found.update(
                    zip(some, backend.encode_batch([text for text, _ in some], add_special_tokens=False), strict=True)
                )
        return found


def _extends(answers: Sequence[Answer]) -> bool:
    """Whether each prompt begins with the text so far."""
    return all(
        after.prompt.startswith(before.prompt + before.target) and after.literal == before.literal
        for before, after in pairwise(answers)
    )


def _within(offsets: Sequence[tuple[int, int]], before: int) -> list[tuple[int, int]]:
    return [(max(0, start - before), max(0, end - before)) for start, end in offsets]


def _cutting(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The added tokens at which every text is cut before anything else happens to it, with their ids."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    changes = normalizer is not None and repr(normalizer) != "Sequence(normalizers=[])"
    return {
        added.content: token_id
        for token_id, added in tokenizer.added_tokens_decoder.items()
        if not (added.lstrip or added.rstrip or added.single_word or (added.normalized and changes))
    }


def token_weights(spans: Sequence[tuple[int, int]], weights: Sequence[tuple[int, float]], length: int) -> np.ndarray:
    """float32 [M]: the mean weight of each token's characters.

    Args:
        spans: half-open, in characters of the target. Tokens of one multi-byte character all have that character.
        weights: (characters, weight) along the target.
        length: characters of the target.
    """
    spans_M2 = np.array(spans, np.int64).reshape(-1, 2)
    counts, values = zip(*weights, strict=True)
    sums = np.concatenate([[0.0], np.cumsum(np.repeat(values, counts))])
    starts = np.minimum(spans_M2[:, 0], length - 1)
    ends = np.minimum(
        np.maximum(spans_M2[:, 1], starts + 1), length
    )  # a token without characters weighs as the one it stands at
    same = np.repeat(np.array(values, np.float32), counts)[starts]
    mean = ((sums[ends] - sums[starts]) / (ends - starts)).astype(np.float32)
    return np.where(ends - starts == 1, same, mean)


def _bytes_under(answer: Answer, spans: Sequence[tuple[int, int]], mask_M: np.ndarray) -> int:
    """UTF-8 bytes of the row's characters that belong to tokens under the mask."""
    counted = np.zeros(len(answer.target) + len(answer.ending) + 1, np.bool_)
    for (start, end), wanted in zip(spans, mask_M, strict=True):
        counted[start:end] |= wanted
    return sum(
        len(answer.target[i].encode()) for place in answer.places for i in range(place.start, place.end) if counted[i]
    )
