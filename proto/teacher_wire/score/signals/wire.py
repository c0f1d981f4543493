"""A signal as it crosses the wire: derived from the fields of its class, so that a new kind needs no line here.

In: a Signal; out: its message, and back with every refusal (RequestError: it is the student that asks).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from teacher_wire.core.errors import RequestError
from teacher_wire.core.parsing import check_name
from teacher_wire.core.signals import CHECKS, Signal, SignalSpec
from teacher_wire.score.signals import SIGNALS
from teacher_wire.score.signals.chosen_layers import MAX_LAYERS
from teacher_wire.v2 import teacher_pb2 as pb

_SHOWN = 64  # characters of a name that is none
_CHECK_CODE = {name: pb.Check.Value(name.upper()) for name in CHECKS}
_CHECK_NAME = {code: name for name, code in _CHECK_CODE.items()}
_NUMBERS, _TEXTS = ("int", "float", int, float), ("str", str)
_INTEGERS_BELOW = 1 << 53  # what a double holds exactly


def encode_spec(spec: SignalSpec) -> pb.SignalSpec:
    """A request's signals."""
    signals = [_encode(signal) for signal in spec.signals]
    return pb.SignalSpec(vocab_rows=spec.vocab_rows, signals=signals, check=_CHECK_CODE[spec.check])


def decode_spec(message: pb.SignalSpec) -> SignalSpec:
    """The signals of a request that arrived.

    Raises:
        RequestError: an unknown kind or setting, or settings that mean nothing; names the field.
    """
    if message.check not in _CHECK_NAME:
        raise RequestError("unknown choice of checked rows", field="spec.check", value=message.check)
    if len(message.signals) > len(SIGNALS):
        raise RequestError("each kind once", field="spec.signals", value=len(message.signals), limit=len(SIGNALS))
    signals = tuple(_decode(signal) for signal in message.signals)
    return SignalSpec(message.vocab_rows, signals, _CHECK_NAME[message.check])


def _encode(signal: Signal) -> pb.Signal:
    settings = {f.name: getattr(signal, f.name) for f in fields(signal)}
    layers, reduction = settings.pop("layers", ()), settings.pop("reduction", "")
    names = {name: settings.pop(name) for name in list(settings) if isinstance(settings[name], str)}
    return pb.Signal(kind=signal.kind, layers=layers, reduction=reduction, numbers=settings, names=names)


def _decode(message: pb.Signal) -> Signal:
    if message.kind not in SIGNALS:
        raise RequestError(
            "unknown kind of signal", field="signal", value=ascii(message.kind[:_SHOWN]), limit="|".join(SIGNALS)
        )
    kind = SIGNALS[message.kind]
    types = {f.name: f.type for f in fields(kind)}
    settings: dict[str, Any] = {}
    for name in sorted(message.numbers):
        _known(kind, name, _NUMBERS, "number")
        settings[name] = _number(message.numbers[name], name, whole=types[name] in ("int", int))
    for name in sorted(message.names):
        _known(kind, name, _TEXTS, "name")
        check_name(f"signal.names.{name}", message.names[name])
        settings[name] = message.names[name]
    for name, value in (("layers", tuple(message.layers[: MAX_LAYERS + 1])), ("reduction", message.reduction)):
        if not value:
            continue
        if name not in types:
            raise RequestError(f"{kind.kind} takes none", field=f"signal.{name}", value=ascii(str(value)[:_SHOWN]))
        settings[name] = value
    if len(settings.get("layers", ())) > MAX_LAYERS:
        raise RequestError("too many layers", field="signal.layers", value=len(message.layers), limit=MAX_LAYERS)
    return kind(**settings)


def _known(kind: type[Signal], name: str, types: tuple[object, ...], what: str) -> None:
    """Refuses a setting of the message that the kind does not have among those of these types."""
    known = [f.name for f in fields(kind) if f.type in types and f.name not in ("layers", "reduction")]
    if name not in known:
        raise RequestError(
            f"{kind.kind} has no such {what}",
            field=f"signal.{what}s",
            value=ascii(name[:_SHOWN]),
            limit="|".join(known) or "none",
        )


def _number(value: float, name: str, *, whole: bool) -> int | float:
    if not abs(value) < _INTEGERS_BELOW or (whole and value != int(value)):  # NaN is not below either
        raise RequestError("a whole number is wanted" if whole else "out of range", field=name, value=value)
    return int(value) if whole else value
