"""Control tokens that stand in a row's own text, and how they stay text.

In: the tokenizer and the chat template's source; out: marked messages, and rendered text in which only the template's own
control tokens are still control tokens. Must never touch a row that holds none: its ids are the tokenizer's.

A *control token* here is bos, eos, pad or unk, a special token that the template writes, or an added token of a shape that nobody
writes by chance (`<|eom_id|>`, `[INST]`) that is special or in the template. Plain tags such as `<tool>` and `<image>`, which people
add to their tokenizers so that rows may use them, and the tags around reasoning and tool calls are left to the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from student_trainer.data.text.layout import THINK_TAGS

_PLAIN_TAG = re.compile(r"</?[\w:.-]+>")
_BRACKETED = re.compile(r"[<\[]\S+[>\]]")
_TAGS = {tag for pair in THINK_TAGS for tag in pair}
_PRIVATE = [
    chr(code) for code in range(0xF0000, 0xF0100)
]  # characters nobody writes; the first one marks, the second renames


class ControlTokens:
    """The control tokens of one tokenizer under one template.

    Attributes:
        ids: id by content.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_source: str) -> None:
        self._tokenizer = tokenizer
        named = {str(tokenizer.special_tokens_map[name]) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in tokenizer.special_tokens_map}  # fmt: skip
        self.ids = {
            added.content: token_id
            for token_id, added in tokenizer.added_tokens_decoder.items()
            if added.content in named
            or (
                added.content not in _TAGS
                and (added.special or (added.content in template_source and _BRACKETED.fullmatch(added.content)))
                and (not _PLAIN_TAG.fullmatch(added.content) or (added.special and added.content in template_source))
            )
        }
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def first_in(self, value: Any) -> str:
        """The first control token in a text, or in any text of a nested value; "" if there is none."""
        if isinstance(value, str):
            found = self._pattern.search(value) if self._pattern else None
            return found.group() if found else ""
        if isinstance(value, Mapping):
            return next((held for item in value.items() for part in item if (held := self.first_in(part))), "")
        if isinstance(value, list | tuple):
            return next((held for part in value if (held := self.first_in(part))), "")
        return ""

    def marked(self, value: Any) -> Any:
        """`value` with a mark inside every control token that stands in one of its texts."""
        if isinstance(value, str):
            return (
                self._pattern.sub(lambda m: m.group()[0] + _PRIVATE[0] + m.group()[1:], value)
                if self._pattern
                else value
            )
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(part) for part in value]
        return value

    def settled(self, rendered: str) -> str:
        """A rendering of marked messages with the template's own control tokens renamed and the marks taken out.

        To be tokenised by `literal_tokenizer`, which knows the control tokens by their new names alone. Lengths stay.
        """
        if self._pattern is None:
            return rendered
        return self._pattern.sub(lambda m: _renamed(m.group()), rendered).replace(_PRIVATE[0], "")

    @cached_property
    def literal_tokenizer(self) -> Any:
        """The tokenizer with its control tokens under other names, so that their old names are ordinary text.

        Its ids are those of the tokenizer, as with `split_special_tokens`, but only inside the row's own text.
        """
        from tokenizers import Tokenizer

        parsed = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for entry in parsed["added_tokens"]:
            if entry["content"] in self.ids:
                entry["content"] = _renamed(entry["content"])
        vocabulary = parsed["model"].get("vocab")
        if isinstance(vocabulary, dict):
            parsed["model"]["vocab"] = {
                _renamed(text) if text in self.ids else text: id_ for text, id_ in vocabulary.items()
            }
        elif vocabulary:  # unigram: [text, score] in order of ids
            parsed["model"]["vocab"] = [
                [_renamed(text) if text in self.ids else text, score] for text, score in vocabulary
            ]
        if merges := parsed["model"].get("merges"):  # a control token that ordinary text could be merged to
            made = (("".join(pair) if isinstance(pair, list) else pair.replace(" ", ""), pair) for pair in merges)
            parsed["model"]["merges"] = [pair for product, pair in made if product not in self.ids]
        unknown = parsed["model"].get("unk_token")
        if unknown in self.ids:
            parsed["model"]["unk_token"] = _renamed(unknown)
        parsed["post_processor"] = None  # it names control tokens, and ids are made without it
        return Tokenizer.from_str(json.dumps(parsed))


def _renamed(content: str) -> str:
    return _PRIVATE[1] + content[1:]
