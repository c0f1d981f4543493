"""The arms of `real_layers`: which terms on layers are tried on the real pair, and which of them are worth seeds and length once a sweep is there.

In: what the runs of a sweep left; out: arms, the most telling first, since a lease may end before the last.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

STUDENT, NARROW = "smollm2-15", "smollm2-narrow"
HALF = {"share": 0.5}
LIGHT = {"weight": 0.05, "anneal": HALF}  # of attention, as docs/concepts/method.md 4.2 has it
UNIFORM = "uniform(3)"
_WORDS = re.compile(r"\[.*\]|\S+")  # a list of blocks is one
_NUMBER = re.compile(r"[0-9.]+(e[-+]?[0-9]+)?")
Settings = Mapping[str, Any]
Run = Mapping[str, Any]  # what one run left; see `real_layers.Bench.one`


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        loss: what is laid over the recipe's section, forward KL with half the hard labels.
        student: folder of REAL.
        graphs: as `model.graphs`; runs that share a card do not record.
    """

    loss: Settings = field(default_factory=dict)
    student: str = STUDENT
    graphs: bool | str = False

    @classmethod
    def of(cls, run: Run) -> Arm:
        """That of a run."""
        return cls(run["loss"], run["student"], run["graphs"])

    @property
    def name(self) -> str:
        """For tables; says all that the arm is."""
        told = " + ".join(_told(section, settings) for section, settings in self.loss.items()) or "recipe"
        return f"{'narrow: ' if self.student == NARROW else ''}{told}{', recorded' if self.graphs else ''}"

    @property
    def alone(self) -> Arm:
        """The recipe alone, by which it is measured."""
        return replace(self, loss={})

    @property
    def hidden(self) -> Settings | None:
        """The settings of `loss.hidden`, if that is all the arm is, and with a projector on what travels by default."""
        found: Settings | None = self.loss.get("hidden")
        plain = found is not None and found.get("objective", "") in ("", "proj_sl1") and "reduction" not in found
        return found if plain and len(self.loss) == 1 else None

    def with_hidden(self, **settings: Any) -> Arm:
        """The same with other settings of `loss.hidden`."""
        return replace(self, loss={**self.loss, "hidden": {**self.loss["hidden"], **settings}})


def _told(section: str, settings: Any) -> str:
    if section == "preset":
        return f"preset {settings}"
    objective = settings.get("objective", "cos" if section == "hidden" else "").removeprefix("proj_")
    parts = [*([] if section == "hidden" else [section]), objective, f"{settings['weight']:g}"]
    parts += [str(settings.get(name) or "") for name in ("layers", "reduction")]
    return " ".join(part for part in (*parts, "annealed" if settings.get("anneal") else "") if part)


def named(name: str) -> Arm:
    """The arm of a name as tables have it, so that one can be asked for without the sweep that it was found in.

    Raises:
        ValueError: a name that no arm has.
    """
    student, told = STUDENT, name
    if told.startswith("narrow: "):
        student, told = NARROW, told.removeprefix("narrow: ")
    try:
        sections = {} if told == "recipe" else dict(map(_section, told.split(" + ")))
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{name!r} names no arm: {error}") from error
    arm = Arm(sections, student)
    if arm.name != name:
        raise ValueError(f"{name!r} names no arm; nearest is {arm.name!r}")
    return arm


def _section(told: str) -> tuple[str, Any]:
    """`cos 12 uniform(6) annealed` -> hidden and its settings; see `_told`."""
    if told.startswith("preset "):
        return "preset", told.removeprefix("preset ")
    words = _WORDS.findall(told)
    section = words.pop(0) if words[0] in ("attention", "ffn") else "hidden"
    settings: dict[str, Any] = {}
    number = next((place for place, word in enumerate(words) if _NUMBER.fullmatch(word)), None)
    if number is None:
        raise ValueError(f"{told!r} says no weight")
    if objective := " ".join(words[:number]):
        projected = {"cos": "", "sl1": "proj_sl1"}  # the default is not written
        settings["objective"] = projected.get(objective, objective) if section == "hidden" else objective
    settings = {"weight": float(words[number])} | {key: value for key, value in settings.items() if value}
    for word in words[number + 1 :]:
        if word == "annealed":
            settings["anneal"] = HALF
        elif word in ("int8", "none", "pca"):
            settings["reduction"] = word
        else:
            settings["layers"] = ast.literal_eval(word) if word.startswith("[") else word
    return section, settings


def hidden(weight: float, *, student: str = STUDENT, **settings: Any) -> Arm:
    """An arm with states of layers alone."""
    return Arm({"hidden": {"weight": weight, **settings}}, student)


def sweep_arms() -> list[Arm]:
    """Everything that is to be told of."""
    taken_over = [[5, 9], [10, 20], [14, 28]]  # the blocks that the cut student has of its teacher, as in the trial
    return [
        Arm(),
        *(hidden(weight) for weight in (3.0, 12.0, 25.0, 1.0, 6.0, 50.0, 0.25)),
        *(hidden(weight, layers=layers) for weight in (3.0, 12.0) for layers in ("uniform(6)", "uniform(14)")),
        *(hidden(weight, anneal=HALF) for weight in (3.0, 12.0)),
        *(hidden(weight, objective="proj_sl1") for weight in (3.0, 12.0)),
        Arm({"preset": "article"}),
        Arm({"attention": LIGHT}),
        Arm({"hidden": {"weight": 3.0}, "attention": LIGHT}),
        Arm(student=NARROW),
        *(hidden(weight, student=NARROW) for weight in (1.0, 6.0, 25.0)),
        Arm({"attention": {"weight": 0.3}}),
        Arm({"attention": {"weight": 0.05, "objective": "relation"}}),
        Arm({"ffn": {"weight": 0.05}}),
        hidden(3.0, layers=taken_over),
        hidden(3.0, reduction="int8"),
        hidden(3.0, objective="gram"),
        hidden(0.3, objective="cka"),
    ]


def final_arms(runs: Sequence[Run]) -> list[Arm]:
    """The recipe alone, the arm with the best NLL at the sweep's last step, its weight doubled and halved, the article's preset, the best with attention, the
    best on other layers, the best annealed (or not), and the narrow student with and without.

    Raises:
        ValueError: the recipe alone is not among the runs, or none of it came to the end.
    """
    gains = _gains(runs)
    if Arm().name not in gains:
        raise ValueError("the sweep holds no run of the recipe alone that came to its end: run it again")
    there = [arm for arm in {arm.name: arm for arm in map(Arm.of, runs)}.values() if arm.name in gains]

    def best(fits: Callable[[Arm, Settings], bool]) -> list[Arm]:
        fitting = [arm for arm in there if arm.hidden is not None and fits(arm, arm.hidden)]
        return sorted(fitting, key=lambda arm: gains[arm.name])[:1]

    found = [Arm(), Arm({"preset": "article"})]
    for arm in best(lambda arm, _: arm.student == STUDENT):
        settings = arm.loss["hidden"]
        layers, weight = settings.get("layers", UNIFORM), settings["weight"]
        found[1:1] = [arm, arm.with_hidden(weight=2 * weight), arm.with_hidden(weight=weight / 2)]
        found += [replace(arm, loss={**arm.loss, "attention": LIGHT})]
        found += best(
            lambda arm, other, layers=layers: arm.student == STUDENT and other.get("layers", UNIFORM) != layers
        )  # type: ignore[misc]
        found += [arm.with_hidden(anneal=None if settings.get("anneal") else HALF)]
    narrow = best(lambda arm, _: arm.student == NARROW)
    found += [narrow[0].alone, *narrow] if narrow else []
    return list({arm.name: arm for arm in found}.values())


def _gains(runs: Sequence[Run]) -> dict[str, float]:
    """By arm, its NLL minus the recipe's at the last step, of the seeds that have both; below 0 is better."""
    last = max((at["step"] for run in runs for at in run["evaluations"]), default=0)
    nll: dict[str, dict[int, float]] = {}
    for run in runs:
        of_arm = nll.setdefault(Arm.of(run).name, {})
        for at in run["evaluations"]:
            if at["step"] == last:
                of_arm[run["seed"]] = at["nll_per_byte"]
    gains = {}
    for arm in map(Arm.of, runs):
        ours, alone = nll[arm.name], nll.get(arm.alone.name, {})
        if both := ours.keys() & alone.keys():
            gains[arm.name] = statistics.fmean(ours[seed] - alone[seed] for seed in both)
    return gains
