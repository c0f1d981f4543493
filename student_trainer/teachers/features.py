"""What a run asks of a teacher's layers: the sections `loss.hidden`, `loss.attention` and `loss.ffn` as pairs of blocks and signals.

In: the sections, the teacher's description, how many blocks the student has; out: a `FeaturePlan`. What the teacher cannot give is refused
by the name of the section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from student_trainer.config.features import AttentionLossConfig, FeatureConfig, HiddenLossConfig
from student_trainer.errors import ConfigError
from student_trainer.losses.features.layers import LayerPair, pairs_of, teacher_layers
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import LAYER_BASIS, TeacherInfo
from teacher_wire.core.signals import Signal
from teacher_wire.score.signals import Attention, Ffn, LayerStates, Relation


@dataclass(frozen=True)
class FeaturePlan:
    """What is learned from a teacher's layers.

    Attributes:
        pairs: of blocks, by section.
        signals: that ask for it, by section.
        teacher_width: D of the teacher.
        basis: that its states travel in; None if they do not, or nothing will be computed with them.
    """

    pairs: Mapping[str, tuple[LayerPair, ...]]
    signals: Mapping[str, Signal]
    teacher_width: int
    basis: LayerBasis | None = None

    @property
    def needs_basis(self) -> bool:
        """Whether the teacher's states travel in a basis."""
        asked = self.signals.get("hidden")
        return isinstance(asked, LayerStates) and asked.reduction == "pca"


def plan_features(
    sections: Mapping[str, FeatureConfig], info: TeacherInfo, vocab_rows: int, student_blocks: int
) -> FeaturePlan:
    """The plan of some sections by name; there is at least one.

    Raises:
        ConfigError: naming the section, what the teacher or the student lacks, and what there is.
    """
    pairs, signals = {}, {}
    for name, section in sections.items():
        first = 0 if isinstance(section, HiddenLossConfig) else 1
        pairs[name] = pairs_of(section.layers, student_blocks, info.layers, setting=f"loss.{name}.layers", first=first)
        signals[name] = _signal(name, section, teacher_layers(pairs[name]), info)
        try:
            signals[name].check(vocab_rows)
            signals[name].check_teacher(info)
        except TeacherWireError as error:
            raise ConfigError(f"loss.{name}: {error}") from error
    return FeaturePlan(pairs, signals, info.hidden_size)


def _signal(name: str, section: FeatureConfig, layers: tuple[int, ...], info: TeacherInfo) -> Signal:
    found: Signal
    if isinstance(section, HiddenLossConfig):
        found = LayerStates(layers, section.reduction)
    elif isinstance(section, AttentionLossConfig):
        found = Relation(layers) if section.objective == "relation" else Attention(layers)
    else:
        found = Ffn(layers, section.objective)
    if found.kind not in info.transports:
        raise ConfigError(
            f"loss.{name}: needs the signal {found.kind}, which teacher {info.name!r} does not give; it gives "
            f"{', '.join(sorted(info.transports)) or 'none'}"
        )
    if not isinstance(section, HiddenLossConfig) or section.reduction != "pca":
        return found
    digest = next((artifact.sha256 for artifact in info.artifacts if artifact.kind == LAYER_BASIS), None)
    if digest is None:
        raise ConfigError(
            f"loss.hidden.reduction=pca: teacher {info.name!r} has no {LAYER_BASIS} to project on: set `features` in its section of "
            "server.yaml, or reduction to int8 or none"
        )
    return LayerStates(layers, "pca", section.rank or info.basis_rank, digest)
