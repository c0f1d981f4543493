"""Turns of a conversation to the ids that inference begins with, and the ids that end an answer.

In: turns; out: ids, token for token those of `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, by the templates of training.
Control tokens that a user types stay text, as in training (docs/data/templates.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.text.answer import Template
from student_trainer.data.text.encoding import Encoder
from student_trainer.data.text.templates import choose
from student_trainer.errors import DataError


class Prompter:
    """Prompts of one tokenizer by one template.

    Args:
        tokenizer: whose ids.
        template: as `data.template` names one: auto, chat, plain, a name, or a file.
        kwargs: variables of the template, such as enable_thinking.

    Raises:
        DataError: no such template, or variables that it does not read.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: Template = choose(template, tokenizer, kwargs=kwargs)
        self._encoder = Encoder(tokenizer, self.template)

    def text(self, conversation: Conversation) -> str:
        """The prompt as text.

        Raises:
            DataError: the template refuses the conversation, or would leave out a part of it.
        """
        return self.template.prompt(conversation)[0]

    def ids(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The ids of each conversation's prompt; the last turn is the one to be answered.

        Raises:
            DataError: as `text`.
        """
        return self._encoder.prompts([self.template.prompt(one) for one in conversations])

    def end_of_turn(self) -> frozenset[int]:
        """The added token that the template ends an answer with; empty where it ends one with none."""
        talk = Conversation((Turn("user", "a"), Turn("assistant", "b")))
        try:
            [[sequence]] = self._encoder.encode([self.template.answers(talk, "last")], "last")
        except DataError:  # a template that wants something else before an answer still has the tokenizer's own end
            return frozenset()
        last = int(sequence.token_ids[-1])
        return frozenset({last} if last in self.tokenizer.added_tokens_decoder else ())


def stop_ids(model: Any, prompter: Prompter) -> frozenset[int]:
    """Ids that end an answer: those of generation_config.json, the tokenizer's eos, and the template's end of turn."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    own = (*listed, prompter.tokenizer.eos_token_id)
    return frozenset(int(token) for token in own if token is not None) | prompter.end_of_turn()
