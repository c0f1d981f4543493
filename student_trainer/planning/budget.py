"""The cheapest settings under which a run fits into a budget of memory: one search over settings, by what they cost.

In: a run that does not fit, and its `Memory`; out: the first combination that does, with its estimate. Settings that keep the run's numbers
come before those that change what is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.config.run import TrainConfig
from student_trainer.errors import ModelError
from student_trainer.planning.estimate.parts import Estimate
from student_trainer.planning.memory import Memory

Changes = dict[str, Any]  # dotted setting -> value


@dataclass(frozen=True)
class WayOut:
    """Settings that fit.

    Attributes:
        changes: by dotted name.
        estimate: of the run with them.
    """

    changes: Changes
    estimate: Estimate

    @property
    def overrides(self) -> str:
        """As the command line takes them."""
        return " ".join(f"{name}={_written(value)}" for name, value in self.changes.items())


def cheapest_under(memory: Memory, budget: int) -> WayOut | None:
    """The first of `candidates` that needs at most `budget` bytes of a card; None if none does."""
    for changes in candidates(memory.config):
        try:
            found = memory.of(changed(memory.config, changes))
        except ModelError:
            continue
        if found.on_card <= budget:
            return WayOut(changes, found)
    return None


def candidates(config: TrainConfig) -> Iterator[Changes]:
    """Combinations of settings, the cheapest first.

    Costs are shares of a step's time as measured (docs/results/speed.md): smaller chunks 0.09, passes that are not recorded 0.3, checkpointing
    0.33, each halving of the batch 0.2. Adapters in place of all weights, and a base in 4 bit, are another run, and come last.
    """
    model, train = config.model, config.train
    axes: list[list[tuple[float, Changes]]] = [
        [(0.0, {})], [(0.0, {})], [(0.0, {})], [(0.0, {})], [(0.0, {})],
    ]  # fmt: skip
    axes[0] += [
        (cost, {"loss.chunk_mb": mb}) for cost, mb in ((0.05, 512), (0.09, 256), (0.2, 64)) if mb < config.loss.chunk_mb
    ]
    if not model.gradient_checkpointing:
        axes[1].append((0.33, {"model.gradient_checkpointing": True}))
    if model.graphs:
        axes[2].append((0.3, {"model.graphs": False}))
    halved, cost = train.batch_size, 0.0
    while halved % 2 == 0:
        halved, cost = halved // 2, cost + 0.2
        longer = train.accumulation * (train.batch_size // halved)
        axes[3].append((cost, {"train.batch_size": halved, "train.accumulation": longer}))
    if model.lora is None:
        axes[4].append((10.0, {"model.lora": LoraSettings().model_dump(mode="json")}))
    if "quantize" in ModelConfig.model_fields and getattr(model, "quantize", None) is None:
        adapters = {} if model.lora is not None else {"model.lora": LoraSettings().model_dump(mode="json")}
        axes[4].append((20.0, adapters | {"model.quantize": "nf4"}))
    combined = [
        (sum(cost for cost, _ in parts), {name: value for _, changes in parts for name, value in changes.items()})
        for parts in itertools.product(*axes)
    ]
    key: Callable[[tuple[float, Changes]], float] = lambda pair: pair[0]  # noqa: E731
    return (changes for _, changes in sorted(combined, key=key) if changes)


def changed(config: TrainConfig, changes: Changes) -> TrainConfig:
    """The config with some settings changed, checked again."""
    tree = config.model_dump()
    for name, value in changes.items():
        section, _, field = name.partition(".")
        tree[section] = {**tree[section], field: value}
    update = {
        section: type(getattr(config, section)).model_validate(tree[section])
        for section in {name.partition(".")[0] for name in changes}
    }
    return config.model_copy(update=update)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "{rank: 16}" if isinstance(value, dict) else str(value)
