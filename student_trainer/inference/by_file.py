"""Prompts of a file answered by one model or several, into a file of answers that a restart goes on with.

In: prompts and speakers; out: `answers.jsonl`. With one speaker a row is a training row of format `messages`, with several it holds the answer
of each by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from student_trainer.inference.answer_file import answering
from student_trainer.inference.prompt_file import FilePrompt
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.speakers import Speaker
from student_trainer.inference.writer import Written
from student_trainer.progress import ProgressBar


def answer_file(
    prompts: Sequence[FilePrompt],
    speakers: Sequence[Speaker],
    sampling: Sampling,
    out: Path,
    console: Console,
    batch_size: int = 8,
) -> int:
    """Answers all prompts; returns how many had been answered before.

    Args:
        prompts: in order.
        speakers: who answers.
        sampling: how.
        out: the file of answers.
        console: where progress is shown.
        batch_size: prompts that are kept at a time.

    Raises:
        RunError: as `answer_file.answering`.
        StudentError, TeacherWireError: a prompt cannot be answered; what is done stays done.
    """
    identity = {"speakers": {one.name: one.identity for one in speakers}, **asdict(sampling)}
    for speaker in speakers:  # a prompt that no template takes is known before the first answer
        read = speaker.prompter.ids([one.conversation for one in prompts])
        for prompt, ids in zip(prompts, read, strict=True):
            speaker.check_room(len(ids), sampling, prompt.key)
    with answering(out, prompts, identity) as file:
        before = file.done
        with ProgressBar(console, out.name, len(prompts), done=before) as bar:
            tokens = 0
            while file.done < len(prompts):
                some = prompts[file.done : file.done + batch_size]
                said = [one.answers([p.conversation for p in some], sampling, file.done) for one in speakers]
                file.add([
                    _row(prompt, {one.name: answers[place] for one, answers in zip(speakers, said, strict=True)})
                    for place, prompt in enumerate(some)
                ])  # fmt: skip
                tokens += sum(made.tokens for answers in said for made in answers)
                bar.update(file.done, figures=f"{tokens:,} tokens")
        file.finish()
    return before


def _row(prompt: FilePrompt, answers: dict[str, Written]) -> dict[str, Any]:
    messages = [turn.message for turn in prompt.conversation.turns]
    if len(answers) == 1:
        [made] = answers.values()
        messages.append({"role": "assistant", "content": made.text})
        return {"source": prompt.key, "messages": messages, "tokens": made.tokens, "finish": made.finish}
    said = {name: {"text": made.text, "tokens": made.tokens, "finish": made.finish} for name, made in answers.items()}
    return {"source": prompt.key, "messages": messages, "answers": said}
