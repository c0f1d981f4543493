"""What a way of writing conversations gives: the answers of one, each behind its exact inference prompt.

In: nothing but types; `templates` and `plain` are the two ways, `encoding` makes ids of answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.text.control_tokens import ControlTokens
from student_trainer.data.text.layout import Place


@dataclass(frozen=True)
class Answer:
    """One trained turn.

    Attributes:
        turn: its number in the conversation.
        prompt: what inference feeds the model to get it.
        target: what the model is to write, through the end of turn where the template writes one.
        ending: the tokenizer's eos where it does not; written behind the last answer of a sequence.
        places: the row's own characters in `target`.
        weights: (characters, weight of their loss) all along target and ending; empty: 1 everywhere.
        literal: control tokens in contents are kept as text: the texts are of `ControlTokens.settled`.
    """

    turn: int
    prompt: str
    target: str
    ending: str = ""
    places: tuple[Place, ...] = ()
    weights: tuple[tuple[int, float], ...] = ()
    literal: bool = False


class Template(Protocol):
    """A way of writing conversations.

    Attributes:
        name: for people.
        source_sha256: digest of the chat template's text; "" for `plain`.
        sources: the texts of the chat templates it may use; empty for `plain`.
        control: the control tokens of the tokenizer under this template.
        begins_with_bos: ids of a sequence begin with the tokenizer's bos, which `prompt` does not show.
        literal_rows: conversations so far in which control tokens were kept as text.
    """

    name: str
    source_sha256: str
    sources: tuple[str, ...]
    control: ControlTokens
    begins_with_bos: bool
    literal_rows: int

    def answers(self, conversation: Conversation, turns: str = "auto") -> list[Answer]:
        """The trained turns in order; with turns="last" only the last turn, and none if nothing has a weight above 0.

        Raises:
            DataError: the template fails, or shows less than the row says.
        """
        ...

    def prompt(self, conversation: Conversation) -> tuple[str, bool]:
        """What inference feeds the model after all turns of `conversation`; and whether it is `literal`, as in `Answer`."""
        ...


def trained(conversation: Conversation, turns: str) -> list[int]:
    """Numbers of the turns that are to be learned."""
    speaking = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    if turns == "last":
        speaking = speaking[-1:]
    return [i for i in speaking if _weighs(conversation.turns[i])]


def _weighs(turn: Turn) -> bool:
    return turn.loss_weight > 0 and (not turn.weights or any(weight > 0 for _, weight in turn.weights))
