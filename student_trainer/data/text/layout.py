"""Where an assistant's words stand in what a chat template renders, and what the model is to write there.

In: the inference prompt, the rendering with the assistant's turn, and the turn; out: the text behind the prompt, and which of
its characters are the row's. Must never lose a word of the row: what the template does not show is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from student_trainer.data.rows.formats import Turn
from student_trainer.errors import DataError

# Tags around reasoning, as chat templates and rows write them.
THINK_TAGS = tuple(
    [(f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")]
    + [("[THINK]", "[/THINK]"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷")]
)
_OPEN = "|".join(re.escape(opening) for opening, _ in THINK_TAGS)
_OPENED = re.compile(rf"({_OPEN})(\s*)\Z")
_CLOSE = "|".join(re.escape(closing) for _, closing in THINK_TAGS)
_CLOSED = re.compile(rf"({_OPEN})\s*({_CLOSE})\s*\Z")
_EMPTY = re.compile(rf"\A\s*({_OPEN})\s*({_CLOSE})\s*")
_TAG = re.compile("|".join(re.escape(tag) for pair in THINK_TAGS for tag in pair))


@dataclass(frozen=True)
class Place:
    """Characters of a target that are the row's.

    Attributes:
        start, length: in the target.
        source: where they stand in the turn's content; None for text beside it (`reasoning_content`, tool calls).
    """

    start: int
    length: int
    source: int | None

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Laid:
    """What is to be written behind a prompt.

    Attributes:
        target: the text, through the end of turn if the template writes one.
        places: the row's characters in it, in order.
        ended: whether the template ends the turn by itself.
    """

    target: str
    places: tuple[Place, ...]
    ended: bool


@dataclass(frozen=True)
class _Parts:
    """A turn's reasoning and answer; `reasoning_at` and `answer_at` are places in the content, `close_at` that of the closing tag."""

    reasoning: str
    answer: str
    reasoning_at: int | None = None
    close_at: int | None = None
    close: str = ""
    answer_at: int = 0


def lay_out(
    prompt: str, whole: str, turn: Turn, number: int, controls: Callable[[str], bool], header: Callable[[], str]
) -> Laid:
    """The target of one assistant turn.

    Args:
        prompt: what inference feeds the model before this turn.
        whole: the conversation up to and with this turn, without a generation prompt.
        turn: the assistant's.
        number: which turn it is, for errors.
        controls: whether a text holds a control token.
        header: what the generation prompt adds to the turns before; asked for only where `whole` rewrites `prompt`.

    The cases, in this order:

    1. `whole` continues `prompt`: the target is the rest, as the template lays it out.
    2. The prompt opens reasoning that the template takes out of the turn again (R1, QwQ): the row's reasoning continues
       it and is closed, or an empty one is; then the answer as the template shows it.
    3. The prompt opens and closes reasoning that the template does not show in the turn: the target is the answer.
    4. `whole` rewrites text before the turn: the target is what stands behind the last header of `whole`.

    Raises:
        DataError: the template shows less than the turn has.
    """
    parts = _parts(turn, number)
    if whole.startswith(prompt):
        return _cut(whole[len(prompt) :], turn, number, parts, controls)
    closed = _CLOSED.search(prompt)
    if closed and parts.reasoning.strip():
        raise DataError(
            f"turn {number} has reasoning, but the generation prompt closes reasoning before it begins; leave it out of the "
            "row, or change template_kwargs (such as enable_thinking)"
        )
    if closed and whole.startswith(prompt[: closed.start()]):
        return _cut(_EMPTY.sub("", whole[closed.start() :], count=1), turn, number, parts, controls)
    opened = _OPENED.search(prompt)
    if opened and whole.startswith(prompt[: opened.start()]):
        return _continued(opened, whole[opened.start() :], turn, number, parts, controls)
    added = header()
    bare = _OPENED.sub("", added)
    at = whole.rfind(added) if added.strip() else -1
    if at >= 0:
        return _cut(whole[at + len(added) :], turn, number, parts, controls)
    at = whole.rfind(bare) if opened and bare.strip() else -1
    if opened and at >= 0:
        return _continued(opened, whole[at + len(bare) :], turn, number, parts, controls)
    raise DataError(
        f"the chat template rewrites its generation prompt when turn {number} is added, so what the model is to write there "
        "cannot be told; use another chat template (data.template) or template=plain"
    )


def _parts(turn: Turn, number: int) -> _Parts:
    beside = turn.extra.get("reasoning_content")
    if isinstance(beside, str) and beside.strip():
        return _Parts(beside, turn.content)
    for opening, closing in THINK_TAGS:
        if closing not in turn.content:
            continue
        before, _, answer = turn.content.partition(closing)
        lead, opened, reasoning = before.rpartition(opening)
        if lead.strip():
            continue  # it talks about tags
        if closing in answer:
            raise DataError(
                f"turn {number} has {closing} more than once, of which chat templates keep only the first and last parts"
            )
        at = len(lead) + len(opened)
        return _Parts(reasoning, answer, at, len(before), closing, len(before) + len(closing))
    return _Parts("", turn.content)


def _cut(span: str, turn: Turn, number: int, parts: _Parts, controls: Callable[[str], bool]) -> Laid:
    """The target in `span`, the template's text behind the prompt."""
    places = _verbatim(span, turn, parts)
    if places is None:
        places = _by_parts(span, parts)
    if places is None:
        what = (
            "reasoning" if parts.reasoning and (not parts.answer.strip() or parts.answer.strip() in span) else "content"
        )
        raise DataError(f"the chat template does not show the {what} of turn {number}", value=turn.content)
    return _ended(span, tuple(places), turn, controls)


def _ended(span: str, places: tuple[Place, ...], turn: Turn, controls: Callable[[str], bool]) -> Laid:
    """Cuts the whitespace behind the end of turn, which belongs to the next one; counts tool calls as the row's text."""
    end = places[-1].end if places else 0
    tail = span[end:].rstrip()
    calls = bool(turn.extra.get("tool_calls"))
    if calls and tail:
        places += (Place(end, len(tail), None),)
    ended = controls(tail) if calls else bool(tail)
    return Laid(span[:end] + tail, places, ended)


def _verbatim(span: str, turn: Turn, parts: _Parts) -> list[Place] | None:
    """The places of a content that is shown as it is, or trimmed; None if it is not."""
    places = []
    start = 0
    if parts.reasoning and parts.reasoning_at is None:
        reasoning = parts.reasoning.strip()
        at = _find(span, reasoning, 0)
        if at < 0:
            return None
        places.append(Place(at, len(reasoning), None))
        start = at + len(reasoning)
    if not turn.content.strip() and turn.extra.get("tool_calls"):
        return places
    for shown in (turn.content, turn.content.strip()):
        at = _find(span, shown, start) if shown else -1
        if at >= 0:
            return [*places, Place(at, len(shown), turn.content.find(shown))]
    return None


def _by_parts(span: str, parts: _Parts) -> list[Place] | None:
    """The places of a content whose reasoning and answer the template lays out in its own way."""
    if parts.reasoning_at is None or parts.close_at is None:
        return None
    places: list[Place] = []
    start = 0
    pieces = ((parts.reasoning, parts.reasoning_at), (parts.close, parts.close_at), (parts.answer, parts.answer_at))
    for text, source in pieces:
        shown = text.strip()
        at = _find(span, shown, start) if shown else -1
        if at < 0 and shown and text is not parts.close:
            return None
        if at >= 0:
            places.append(Place(at, len(shown), source + text.find(shown)))
            start = at + len(shown)
    return places


def _continued(
    opened: re.Match[str], body: str, turn: Turn, number: int, parts: _Parts, controls: Callable[[str], bool]
) -> Laid:
    """The target behind a prompt that opens reasoning; `body` is what the template shows of the turn, its own tags included."""
    closing = dict(THINK_TAGS)[opened.group(1)]
    _, _, behind = body.rpartition(closing) if closing in body else ("", "", body)
    behind = behind.lstrip("\n")
    reasoning = parts.reasoning.strip("\n")
    lead = ("" if "\n" in opened.group(2) or not reasoning else "\n") + reasoning
    head = f"{lead}\n{closing}\n\n"
    places = []
    if reasoning:
        source = None if parts.reasoning_at is None else parts.reasoning_at + parts.reasoning.find(reasoning)
        places.append(Place(len(lead) - len(reasoning), len(reasoning), source))
    places.append(Place(len(lead) + 1, len(closing), parts.close_at) if parts.close_at is not None else Place(len(lead) + 1, 0, None))  # fmt: skip
    answer = parts.answer.strip("\n") if parts.answer.strip("\n") in behind else parts.answer.strip()
    if answer:
        at = _find(behind, answer, 0)
        if at < 0:
            raise DataError(f"the chat template does not show the content of turn {number}", value=turn.content)
        places.append(Place(len(head) + at, len(answer), parts.answer_at + parts.answer.find(answer)))
    else:
        places.append(Place(len(head), 0, None))
    return _ended(head + behind, tuple(places), turn, controls)


def _find(text: str, piece: str, start: int) -> int:
    """Where `piece` stands from `start` on, not inside a tag; -1 if nowhere."""
    inside = [match.span() for match in _TAG.finditer(text)]
    at = text.find(piece, start)
    while at >= 0 and any(a < at + len(piece) and at < b and not (at <= a and b <= at + len(piece)) for a, b in inside):
        at = text.find(piece, at + 1)
    return at


def weights_along(turn: Turn, laid: Laid, ending: int) -> tuple[tuple[int, float], ...]:
    """(characters, weight) all along a target and `ending` more characters; () where every weight is 1.

    What the template adds weighs as the characters before it, at the start as those behind it; text beside the content, and
    contents without weights of their own, weigh 1. All is multiplied by the turn's `loss_weight`.
    """
    if not turn.weights:
        return () if turn.loss_weight == 1 else ((len(laid.target) + ending, turn.loss_weight),)
    characters = [weight for count, weight in turn.weights for _ in range(count)]
    along: list[float | None] = [None] * (len(laid.target) + ending)
    for place in laid.places:
        source = None if place.source is None else characters[place.source : place.source + place.length]
        along[place.start : place.end] = source if source is not None else [1.0] * place.length
    first = next((weight for weight in along if weight is not None), 1.0)
    filled = list(_filled(along, first))
    return tuple((len(list(run)), weight * turn.loss_weight) for weight, run in groupby(filled))


def _filled(along: list[float | None], last: float) -> Iterator[float]:
    for weight in along:
        last = last if weight is None else weight
        yield last
