"""The arms of a comparison: ways to train that are made from one config.

In: the config's plain data and the name of an arm, or overrides; out: the plain data of the arm. Trains nothing and reads nothing else.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.config.files import override_tree, read_tree
from student_trainer.config.model import ModelConfig
from student_trainer.errors import ConfigError

Tree = dict[str, Any]
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
_HARD_WEIGHT = 0.5  # `loss.sft_weight` beside a distillation term, the config's default
_FOUR_BIT, _KIND = "quantize", "nf4"  # the field of `model` that keeps the base in 4 bits (QLoRA), and how


def _loss(tree: Tree) -> Tree:
    found = tree.get("loss") or {}
    return dict(found) if isinstance(found, Mapping) else {}


def _sft(tree: Tree) -> Tree:
    kept = {name: value for name, value in _loss(tree).items() if name == "chunk_mb"}
    return _off_policy({**tree, "loss": {**kept, "output": None, "sft_weight": 1.0}})


def _distilled(tree: Tree, sft_weight: float) -> Tree:
    loss = _loss(tree)
    kept = {name: loss[name] for name in ("chunk_mb", "output") if loss.get(name) is not None}
    return _off_policy({**tree, "loss": {"output": {}, **kept, "sft_weight": sft_weight}})


def _gkd(tree: Tree) -> Tree:
    return _distilled(tree, 0.0)


def _gkd_sft(tree: Tree) -> Tree:
    weight = _loss(tree).get("sft_weight")
    return _distilled(tree, weight if isinstance(weight, int | float) and weight > 0 else _HARD_WEIGHT)


def _on_policy(tree: Tree) -> Tree:
    return {**_gkd_sft(tree), "on_policy": tree.get("on_policy") or {}}


def _off_policy(tree: Tree) -> Tree:
    return {name: value for name, value in tree.items() if name != "on_policy"}


def _article(tree: Tree) -> Tree:
    return _off_policy({**tree, "loss": {"preset": "article"}})


def _model(tree: Tree) -> Tree:
    """The section `model` without what decides whether and how adapters are trained."""
    found = tree.get("model")
    return {name: v for name, v in found.items() if name != _FOUR_BIT} if isinstance(found, Mapping) else {}


def _full(tree: Tree) -> Tree:
    return {**tree, "model": {**_model(tree), "lora": None}}


def _lora(tree: Tree) -> Tree:
    model = _model(tree)
    return {**tree, "model": {**model, "lora": model.get("lora") or {}}}


def _qlora(tree: Tree) -> Tree:
    if _FOUR_BIT not in ModelConfig.model_fields:
        raise ConfigError(
            f"arm qlora: this version has no setting model.{_FOUR_BIT}, a base in 4 bits: leave the arm out, or take lora"
        )
    found = tree.get("model")
    kept = found.get(_FOUR_BIT) if isinstance(found, Mapping) else None
    adapted = _lora(tree)
    return {**adapted, "model": {**adapted["model"], _FOUR_BIT: kept or _KIND}}


@dataclass(frozen=True)
class Named:
    """An arm that has a name of its own.

    Attributes:
        made: plain data of the config -> of the arm.
        told: what it is, for help.
    """

    made: Callable[[Tree], Tree]
    told: str


NAMED: Mapping[str, Named] = {
    "config": Named(lambda tree: tree, "the config as it is"),
    "sft": Named(_sft, "hard labels alone"),
    "gkd": Named(_gkd, "the config's loss.output alone: no hard labels, no terms on layers"),
    "gkd+sft": Named(_gkd_sft, "the same with hard labels beside it (the config's sft_weight, or 0.5)"),
    "on-policy": Named(_on_policy, "gkd+sft with the student's own samples (the config's on_policy, or its defaults)"),
    "article": Named(_article, "loss.preset=article"),
    "full": Named(_full, "the config with every weight trained"),
    "lora": Named(_lora, "the config with adapters"),
    "qlora": Named(_qlora, "the config with adapters on a base in 4 bits; needs a GPU"),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for folders and tables.
        named: arms of `NAMED` that are applied one after another.
        overrides: `section.field=value`, applied last.
    """

    name: str
    named: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"arm {self.name!r}: a name of up to 64 letters, digits and . _ + - that begins with a letter or digit"
            )
        for name in self.named:
            if name not in NAMED:
                raise ConfigError(f"arm {name!r} is unknown; there are {', '.join(NAMED)}, and --arm NAME SETTINGS")
        for override in self.overrides:
            _check_free(self.name, override.partition("=")[0].strip())

    def tree(self, config: Path, overrides: Sequence[str] | None = None) -> Tree:
        """The plain data of this arm.

        Raises:
            ConfigError: the file cannot be read, or an override has no place.
        """
        return self.of(read_tree(config.expanduser(), list(overrides or [])))

    def of(self, tree: Tree) -> Tree:
        """The plain data of this arm, from that of the config, which stays as it is."""
        made = copy.deepcopy(tree)
        for name in self.named:
            made = NAMED[name].made(made)
        return override_tree(made, self.overrides)


def _check_free(arm: str, key: str) -> None:
    """Refuses what a comparison decides itself."""
    ways = {"run.output_dir": "--out", "run.seed": "--seeds", "run": "--out and --seeds"}
    if key in ways:
        raise ConfigError(f"arm {arm}: {key} is the comparison's to set: use {ways[key]}")


def named_arm(name: str) -> Arm:
    """The arm of a name of `NAMED`.

    Raises:
        ConfigError: there is none of this name.
    """
    return Arm(name, (name,))


def free_arm(name: str, settings: str) -> Arm:
    """An arm of one's own.

    Args:
        name: for folders and tables.
        settings: names of `NAMED`, then overrides, apart by spaces and quoted as in a shell: `gkd labels.k=8 loss.output.beta=0.1`.

    Raises:
        ConfigError: it says nothing, an arm in it is unknown, or a quote is not closed.
    """
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise ConfigError(f"--arm {name}: {settings!r} cannot be read: {error}") from error
    if not words:
        raise ConfigError(f"--arm {name}: says no settings; write e.g. --arm {name} 'gkd labels.k=8'")
    named = tuple(word for word in words if "=" not in word)
    return Arm(name, named, tuple(word for word in words if "=" in word))
