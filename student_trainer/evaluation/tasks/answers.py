"""Greedy answers to the questions of held-out rows: how long they are, and some of them to read.

In: an engine and conversations without their last answer; out: `avg_response_len` and what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from student_trainer.data.rows.formats import Conversation
from student_trainer.errors import DataError
from student_trainer.evaluation.tasks.engine import Engine
from student_trainer.inference.prompt_file import FilePrompt
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.writer import Written
from student_trainer.progress import ProgressBar


@dataclass(frozen=True)
class Answers:
    """What a model wrote.

    Attributes:
        written: an answer per question, in order.
    """

    written: tuple[Written, ...]

    def figures(self) -> dict[str, float]:
        """`avg_response_len`, the mean of tokens without those that end an answer, and `cut_off`, the share that the limit ended."""
        count = len(self.written)
        return {
            "avg_response_len": sum(made.tokens for made in self.written) / count,
            "cut_off": sum(made.finish == "length" for made in self.written) / count,
        }


def write_answers(engine: Engine, questions: Sequence[FilePrompt], max_new_tokens: int, console: Console) -> Answers:
    """Greedy answers to all questions.

    Raises:
        DataError: a question and its answer are longer than the model takes.
        TeacherWireError: the teacher does not write.
    """
    prompts = engine.prompter.ids([one.conversation for one in questions])
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if engine.max_tokens is not None and len(prompts[longest]) + max_new_tokens > engine.max_tokens:
        raise DataError(
            f"{questions[longest].key}: a prompt of {len(prompts[longest]):,} tokens and --max-new-tokens {max_new_tokens:,} are more than the "
            f"{engine.max_tokens:,} that {engine.name} takes: lower --max-new-tokens, or leave the row out"
        )
    with ProgressBar(console, f"{engine.name} answers", len(prompts)) as bar:
        ended = 0

        def done(count: int) -> None:
            nonlocal ended
            ended += count
            bar.update(ended)

        return Answers(tuple(engine.write(prompts, Sampling(max_new_tokens=max_new_tokens), (), done)))


def question_of(conversation: Conversation) -> str:
    """What the last turn asks, for readers."""
    return conversation.turns[-1].content
