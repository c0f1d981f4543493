"""Conversations to segments of text, each supervised or not.

In: a `Conversation` and the tokenizer. Out: `Segment`s that are tokenised one by one, so that the ids of a training
prompt equal those of the inference prompt even where a merge would cross the border ("assistant\\n" + "    return").
Must never alter a content, nor supervise anything but an assistant's content and its end of turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from student_trainer.data.formats import Conversation, Turn
from student_trainer.errors import DataError


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenised by itself.

    Attributes:
        text: never empty; special tokens are written out.
        supervised: whether its tokens are targets of the loss.
        content_bytes: UTF-8 bytes of the assistant's content within; the end of turn counts none.
        weights: (characters, weight of their loss) all along the text; empty: 1 everywhere.
    """

    text: str
    supervised: bool
    content_bytes: int = 0
    weights: tuple[tuple[int, float], ...] = ()


Template = Callable[[Conversation, PreTrainedTokenizerBase], list[Segment]]


def chat(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The tokenizer's own chat template, rendered turn by turn.

    Supervised: each assistant span from after the generation prompt through its end-of-turn token, not the whitespace
    behind it. A template without an end of turn (GLM) gets the tokenizer's eos after the last turn. BOS is as the
    template renders it, as in inference servers. Templates that trim contents (Llama) teach the trimmed content.

    Raises:
        DataError: the template fails, rewrites earlier turns, or does not show an assistant's content.
    """
    segments: list[Segment] = []
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    done = ""  # rendered text that is in segments already
    for i, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
        whole = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise DataError(
                f"the chat template rewrites earlier text when turn {i} is added, so training prompts would differ "
                "from inference prompts; use another chat template or template=plain"
            )
        span = whole[len(prompt) :]
        content = turn.content if turn.content in span else turn.content.strip()
        start = span.find(content)
        if start < 0:
            raise DataError(f"the chat template does not show the content of turn {i}", value=turn.content)
        end = start + len(content)
        target = span[:end] + span[end:].rstrip()
        if i == len(messages) - 1 and len(target) == end:
            target += _eos(tokenizer)
        segments += _unsupervised(prompt[len(done) :])
        weights = _weights(turn, content, start, len(target))
        segments.append(Segment(target, True, len(content.encode()), weights))
        done = prompt + span[: len(target)]
    return segments


def plain(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """For tokenizers without a chat template: each turn before the answer and a newline, then the answer and eos.

    A BOS is written first if the tokenizer puts one before plain text by itself.

    Raises:
        DataError: the tokenizer has no eos token.
    """
    segments: list[Segment] = []
    pending = _own_bos(tokenizer)
    for turn in conversation.turns:
        if turn.role == "assistant":
            segments += _unsupervised(pending)
            target = turn.content + _eos(tokenizer)
            weights = _weights(turn, turn.content, 0, len(target))
            segments.append(Segment(target, True, len(turn.content.encode()), weights))
            pending = ""
        else:
            pending += turn.content + "\n"
    return segments


TEMPLATES: dict[str, Template] = {"chat": chat, "plain": plain}


def choose(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template called `name`; "auto" is chat where the tokenizer has a chat template, plain elsewhere.

    Raises:
        DataError: an unknown name, or chat without a chat template.
    """
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "plain"
    if name not in TEMPLATES:
        raise DataError(f"unknown template; known: auto, {', '.join(TEMPLATES)}", field="template", value=name)
    if name == "chat" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; use template=plain", field="template", value=name)
    return TEMPLATES[name]


def prompt_segments(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[Segment]:
    """What inference feeds the model to get the last answer: everything before it."""
    return template(conversation, tokenizer)[:-1]


def _weights(turn: Turn, content: str, start: int, length: int) -> tuple[tuple[int, float], ...]:
    """The turn's weights along a target of `length` characters that shows `content` (trimmed, perhaps) from `start` on.

    What the template adds weighs as the characters beside it.
    """
    if not turn.weights:
        return ()
    characters = [weight for count, weight in turn.weights for _ in range(count)]
    first = turn.content.find(content)
    shown = characters[first : first + len(content)]
    whole = [shown[0]] * start + shown + [shown[-1]] * (length - start - len(shown))
    return tuple((len(list(run)), weight) for weight, run in groupby(whole))


def _unsupervised(text: str) -> list[Segment]:
    return [Segment(text, supervised=False)] if text else []


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # jinja runs the template's own code, which raises what it likes
        raise DataError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no eos token to end an answer with")
    return str(tokenizer.eos_token)


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS text if the tokenizer itself puts a BOS before plain text, else ""."""
    first = tokenizer("a")["input_ids"][:1]
    return str(tokenizer.bos_token) if tokenizer.bos_token is not None and first == [tokenizer.bos_token_id] else ""
