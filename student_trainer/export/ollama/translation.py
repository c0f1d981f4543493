"""A chat template (jinja) as a Go template: what stands around messages is read off renderings, and the result is proved on conversations.

In: what renders a conversation as the student was trained on it; out: the Go template, and in words what it cannot do. Every family whose
prompts are messages between fixed texts comes out right (ChatML, Llama 3, Gemma, GLM, Mistral and others), without a table of families.
A template of another kind (one that prints the day, numbers turns, or changes contents) renders otherwise on one of the conversations,
and is refused with that conversation: a Go template that is silently wrong would make a good student look bad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from student_trainer.errors import DataError, ModelError
from student_trainer.export.ollama.go_text import GoTemplateError, quoted, render

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]

_SYSTEM, _USER, _ANSWER, _NEXT = "Lyceumsystem", "Lyceumuser", "Lyceumanswer", "Lyceumnext"
_STOP = '{{ index "" 0 }}'  # Go ends the request with an error, which is better than an answer to a prompt that nobody trained on


@dataclass(frozen=True)
class Translated:
    """A Go template that renders as the chat template does.

    Attributes:
        source: for TEMPLATE.
        proved_on: how many conversations it was compared on.
        notes: what it cannot do, a sentence each.
    """

    source: str
    proved_on: int
    notes: tuple[str, ...]


def translate(jinja: Render, name: str, *, bos: str = "") -> Translated:
    """The Go template of a chat template.

    Args:
        jinja: renders messages up to where the answer begins.
        name: of the model, for errors.
        bos: what the engine puts in front of every prompt by itself, and the template must therefore not.

    Raises:
        ModelError: the template cannot be translated; names the conversation on which the two differ.
    """

    def wanted(messages: Sequence[Message]) -> str:
        text = jinja(messages)
        if bos and not text.startswith(bos):
            raise ModelError(
                f"{name}: llama.cpp puts {bos!r} in front of every prompt, and the chat template does not, so Ollama's prompts would be others; "
                "use --format gguf and render the prompts yourself"
            )
        return text.removeprefix(bos)

    try:
        source, notes = _derive(wanted)
    except (DataError, ValueError) as error:
        raise ModelError(f"{name}: its chat template cannot be written as an Ollama TEMPLATE: {error}") from error
    has_system = not any("system" in note for note in notes)
    proved = 0
    for messages in _conversations(with_system=has_system):
        expected = wanted(messages)
        try:
            found = render(source, messages)
        except GoTemplateError as error:
            raise ModelError(f"{name}: its chat template gives no Go template: {error}") from error
        if found != expected:
            raise ModelError(
                f"{name}: its chat template cannot be written as an Ollama TEMPLATE: {_difference(messages, expected, found)}"
            )
        proved += 1
    return Translated(source, proved, (*notes, *_limits(wanted, source)))


def _derive(jinja: Render) -> tuple[str, tuple[str, ...]]:
    """The template of what stands around the sentinels of a few renderings."""
    user, answer, later = (
        {"role": role, "content": text} for role, text in (("user", _USER), ("assistant", _ANSWER), ("user", _NEXT))
    )
    first, behind = _around(jinja([user]), _USER)
    begin, after_user, after_answer, end = _around(jinja([user, answer, later]), _USER, _ANSWER, _NEXT)
    if (begin, end) != (first, behind):
        raise ValueError("a longer conversation begins or ends otherwise than a short one")
    notes: tuple[str, ...] = ()
    try:
        before_system, after_system, with_system = _around(
            jinja([{"role": "system", "content": _SYSTEM}, user]), _SYSTEM, _USER
        )
    except DataError as error:
        opening = f"{{{{ if .System }}}}{_STOP}{{{{ end }}}}{quoted(first)}"
        notes = (f"the chat template takes no system message ({error}), and Ollama refuses one with an error",)
    else:
        if with_system != behind:
            raise ValueError("with a system message the prompt ends otherwise than without")
        opening = f"{{{{ if .System }}}}{quoted(before_system)}{{{{ .System }}}}{quoted(after_system)}{{{{ else }}}}{quoted(first)}{{{{ end }}}}"
    last = "eq (len (slice $.Messages $i)) 1"
    turns = (
        "{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "user" }}'
        f"{{{{ if $answered }}}}{quoted(after_answer)}{{{{ end }}}}"
        f"{{{{ $m.Content }}}}{{{{ if {last} }}}}{quoted(behind)}{{{{ else }}}}{quoted(after_user)}{{{{ end }}}}"
        '{{ else if eq $m.Role "assistant" }}'
        f"{{{{ if eq $i 0 }}}}{_STOP}{{{{ end }}}}{{{{ $answered = true }}}}{{{{ $m.Content }}}}"
        '{{ else if or (ne $m.Role "system") (ne $i 0) }}'
        f"{_STOP}"
        "{{ end }}{{ end }}"
    )
    return "{{ $answered := false }}" + opening + turns, notes


def _around(text: str, *sentinels: str) -> tuple[str, ...]:
    """What stands before, between and behind the sentinels.

    Raises:
        ValueError: one is not there exactly once, or in another order.
    """
    parts = []
    for sentinel in sentinels:
        if text.count(sentinel) != 1:
            raise ValueError(
                f"a message's content stands {text.count(sentinel)} times in the prompt, or in another order"
            )
        before, _, text = text.partition(sentinel)
        parts.append(before)
    return (*parts, text)


def _conversations(*, with_system: bool) -> list[list[Message]]:
    """Talks of one to four questions, whose contents are of many kinds."""
    contents = [
        "hello", "What is 2 + 2?", "a\nb\n\nc", "{{ .System }} {% raw %} \"quoted\" 'and' \\n `x`", "Grüße, 你好, 🙂", "x" * 300, "1", "```py\nprint(1)\n```",
    ]  # fmt: skip
    found: list[list[Message]] = []
    for number, content in enumerate(contents):
        for turns in (1, 2, 4):
            talk: list[Message] = []
            for turn in range(turns):
                talk.append(
                    {
                        "role": "user",
                        "content": content if turn == turns - 1 else contents[(number + turn) % len(contents)],
                    }
                )
                if turn < turns - 1:
                    talk.append({"role": "assistant", "content": contents[(number + 2 * turn + 1) % len(contents)]})
            found.append(talk)
            if with_system:
                found.append([{"role": "system", "content": contents[(number + 3) % len(contents)]}, *talk])
    return found


def _limits(jinja: Render, source: str) -> list[str]:
    """What contents come out otherwise, although they may occur."""
    thought = "<think>\nbecause\n</think>\n\nfour"
    trials = {
        "contents that begin or end with white space are trimmed by the chat template, and not by Ollama: send them trimmed": [
            {"role": "user", "content": "  a \n"}
        ],
        "the chat template takes the thoughts out of earlier answers, and Ollama does not: send answers without their <think> part": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": thought}, {"role": "user", "content": "b"}
        ],
    }  # fmt: skip
    notes = ["tools are not in the TEMPLATE"]
    for note, messages in trials.items():
        try:
            if jinja(messages) != render(source, messages):
                notes.append(note)
        except (DataError, ValueError) as error:
            notes.append(f"{note} ({error})")
    return notes


def _difference(messages: Sequence[Message], expected: str, found: str) -> str:
    place = next(
        (k for k, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    roles = ", ".join(message["role"] for message in messages)
    return (
        f"on a conversation of {roles} it renders {expected[max(0, place - 20) : place + 40]!r} where Go renders "
        f"{found[max(0, place - 20) : place + 40]!r}"
    )
