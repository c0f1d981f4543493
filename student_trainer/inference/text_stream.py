"""Tokens to text as they come, without a character before it is whole.

In: ids one by one; out: the text that each makes certain. What all of it joins to is the tokenizer's own text of all ids.
"""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer decodes bytes to that are no whole character (yet)


class TextStream:
    """One answer being written; special tokens are left out, as for readers.

    A token is decoded behind those of the last certain text, since some tokenizers write a first token otherwise (SentencePiece's spaces).

    Args:
        tokenizer: whose ids come.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""  # that is certain
        self._before = self._certain = (
            0  # tokens from `_before` to `_certain` are decoded again as what stands in front
        )

    def push(self, token: int) -> str:
        """The text that this token makes certain; "" inside of a character."""
        self.ids.append(token)
        known = self._decoded(self.ids[self._before : self._certain])
        whole = self._decoded(self.ids[self._before :])
        if whole.endswith(_UNFINISHED) or len(whole) <= len(known):
            return ""
        self._before, self._certain = self._certain, len(self.ids)
        return self._more(whole[len(known) :])

    def finish(self) -> str:
        """What is left at the end, broken characters as they are."""
        whole = self._decoded(self.ids)
        return self._more(whole[len(self.text) :] if whole.startswith(self.text) else "")

    def _more(self, text: str) -> str:
        self.text += text
        return text

    def _decoded(self, ids: list[int]) -> str:
        return decoded(self._tokenizer, ids)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of an answer: special tokens left out, spaces as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
