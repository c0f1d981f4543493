"""Conversations without a chat template: the texts of the turns, one line break after each that is not the assistant's.

In: a `Conversation` and the tokenizer; out: `Answer`s. Must never write what has no place here: it is refused by name.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.text.answer import Answer, trained
from student_trainer.data.text.control_tokens import ControlTokens
from student_trainer.data.text.layout import Laid, Place, weights_along
from student_trainer.errors import DataError

PLAIN = "plain"


class PlainTemplate:
    """For tokenizers without a chat template: each turn before the answer and a newline, then the answer and eos; see `Template`.

    A sequence begins with bos if the tokenizer puts one before text by itself.
    """

    name = PLAIN
    source_sha256 = ""
    sources: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
        self.begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
            tokenizer.bos_token_id
        ]
        self.control = ControlTokens(tokenizer, "")
        self.literal_rows = 0

    def answers(self, conversation: Conversation, turns: str = "auto") -> list[Answer]:
        if self._eos is None:
            raise DataError("the tokenizer has no eos token to end an answer with")
        asked_for = trained(conversation, turns)
        literal = self._check(conversation, asked_for)
        eos = self.control.settled(self._eos) if literal else self._eos
        answers = []
        prompt = ""
        for i, turn in enumerate(conversation.turns):
            if turn.role != "assistant":
                prompt += turn.content + "\n"
                continue
            laid = Laid(turn.content + eos, (Place(0, len(turn.content), 0),), True)
            if i in asked_for:
                answers.append(Answer(i, prompt, laid.target, "", laid.places, weights_along(turn, laid, 0), literal))
            prompt += laid.target
        return answers

    def prompt(self, conversation: Conversation) -> tuple[str, bool]:
        asked = replace(conversation, turns=(*conversation.turns, Turn("assistant", "-")))
        [answer] = self.answers(asked, "last")
        return answer.prompt, answer.literal

    def _check(self, conversation: Conversation, asked_for: list[int]) -> bool:
        if conversation.tools or conversation.template_kwargs:
            field = "tools" if conversation.tools else "chat_template_kwargs"
            raise DataError("template=plain has no place for it; use a chat template", field=field)
        held = False
        for i, turn in enumerate(conversation.turns):
            if named := [name for name in ("reasoning_content", "tool_calls") if turn.extra.get(name)]:
                raise DataError(
                    "template=plain has no place for it; use a chat template", field=f"messages[{i}].{named[0]}"
                )
            found = self.control.first_in(turn.content)
            if found and i in asked_for:
                raise DataError(
                    f"turn {i} of the assistant holds {found!r}, a control token of the tokenizer (id {self.control.ids[found]}); "
                    "take it out of the row", field=f"messages[{i}].content",
                )  # fmt: skip
            held = held or bool(found)
        self.literal_rows += held
        return held
