"""How near a student's layers are to its teacher's, measured before the first step and after the last, and drawn.

In: held-out rows, the teacher's labels of its layers, the terms that learn from them; out: figures by name, layers.json and layers.png in
the folder of the run. No gradients; nothing random is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from student_trainer.data.dataset import IndexedExample, collate
from student_trainer.files import read_object, write_whole
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack_own
from student_trainer.losses.align import row_index
from student_trainer.losses.features.hidden_term import sample
from student_trainer.losses.features.labels import layer_states
from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.features.states import FEWEST_SAMPLED, debiased_cka, rms_normed
from student_trainer.losses.term import LossTerm, SupervisedRows, TeacherLabels
from student_trainer.losses.total import taps_of
from student_trainer.model.load import Student
from teacher_wire.labels.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE_NAME, PICTURE_NAME = "layers.json", "layers.png"
MOST_ROWS = 32  # sequences that are measured
BATCH = 8  # of them in a pass
_BEFORE, _AFTER = "#8C8C8C", "#0072B2"  # Okabe and Ito (2008)
_TITLES = {
    "cka": ("hidden states: debiased CKA", "higher is nearer"),
    "hidden_loss": ("hidden states: objective", "lower is nearer"),
    "attention_loss": ("attention: objective", "lower is nearer"),
    "ffn_loss": ("FFN: objective", "lower is nearer"),
}


@torch.no_grad()
def measure_layers(
    student: Student,
    terms: Sequence[LossTerm],
    states: Sequence[LayerPair],
    batches: Sequence[tuple[Sequence[IndexedExample], LabelTensors]],
) -> dict[str, float]:
    """Figures over all rows at hand.

    Args:
        student: whose mode is restored.
        terms: on features; at the weight of step 0.
        states: pairs whose states are compared by debiased CKA as well.
        batches: rows, and the teacher's answer about them with every signal of the terms.

    Returns:
        The figures per block of the terms, such as `attention_loss_5`, and `cka_5` for block 5 of the student.
    """
    sums: dict[str, list[float]] = {}
    kept: dict[LayerPair, list[tuple[torch.Tensor, torch.Tensor]]] = {pair: [] for pair in states}
    device = student.outline.device
    training = student.model.training
    student.model.eval()
    try:
        for examples, labels in batches:
            ids_BL = collate(examples, student.pad_id)["input_ids"]
            packed = pack_own([item.example for item in examples])
            index_N = row_index(packed.cu_lengths_B1, packed.wanted_T, ids_BL.shape[1])
            sequence_N, position_N = divmod(index_N, ids_BL.shape[1])
            rows = SupervisedRows(
                torch.from_numpy(index_N).to(device),
                torch.from_numpy(packed.labels_N()).long(),
                torch.ones(len(index_N)),
                position_N,
                sequence_N,
            )
            there = labels.to(device)
            outputs = student.forward(ids_BL.to(device), taps_of(terms))
            for term in terms:
                answered = term.term(outputs, TeacherLabels(None, there.named), rows, float(len(index_N)), 0)
                for name, mean in answered.parts.items():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0] += float(mean.sum)
                    total[1] += float(mean.over)
            chosen_M = torch.from_numpy(sample(rows)).to(device)
            for pair in states:
                ours_MD = rms_normed(rows.of(outputs.taps[pair.student])[chosen_M])
                kept[pair].append((ours_MD, layer_states(there.named, pair.teacher)[chosen_M]))
    finally:
        student.model.train(training)
    figures = {name: total / over for name, (total, over) in sums.items() if over and name[-1].isdigit()}
    for pair, parts in kept.items():
        ours_MD, theirs_MR = (torch.cat(side) for side in zip(*parts, strict=True))
        if len(ours_MD) >= FEWEST_SAMPLED:
            figures[f"cka_{pair.student}"] = float(debiased_cka(ours_MD, theirs_MR))
    return figures


def keep_before(folder: Path, measure: Callable[[], dict[str, float]], *, resumed: bool) -> dict[str, float]:
    """What is measured before step 0, written to the folder; of a resumed run, what was written then. Nothing, if that is lost.

    Raises:
        OSError: the disk does not take it.
    """
    if resumed:
        try:
            found = read_object(folder / FILE_NAME)["before"]
            return {str(name): float(value) for name, value in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
    before = measure()
    write_whole(folder / FILE_NAME, json.dumps({"before": before}, indent=1) + "\n")
    return before


def write_layers(folder: Path, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Writes layers.json and layers.png.

    Raises:
        OSError: the disk does not take them.
    """
    write_whole(folder / FILE_NAME, json.dumps({"before": dict(before), "after": dict(after)}, indent=1) + "\n")
    figure = draw_layers(before, after)
    if figure is not None:
        with replacing(folder / PICTURE_NAME) as partial:
            figure.savefig(partial, format="png", dpi=150)


def draw_layers(before: Mapping[str, float], after: Mapping[str, float]) -> Figure | None:
    """A panel per kind of figure, a line per block of the student from before to after; None if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted(before.keys() & after.keys())
    kinds = [kind for kind in _TITLES if any(name.rpartition("_")[0] == kind for name in names)]
    if not kinds:
        return None
    of_kind = {
        kind: sorted((int(name.rpartition("_")[2]), name) for name in names if name.rpartition("_")[0] == kind)
        for kind in kinds
    }
    most = max(len(blocks) for blocks in of_kind.values())
    figure = Figure(figsize=(4.4 * len(kinds), 1.9 + 0.34 * most), layout="constrained")
    FigureCanvasAgg(figure)
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        for height, (_, name) in enumerate(of_kind[kind]):
            axes.plot([before[name], after[name]], [height, height], color="#CCCCCC", linewidth=2, zorder=1)
            axes.scatter(before[name], height, color=_BEFORE, s=46, zorder=2, label="before" if height == 0 else None)
            axes.scatter(after[name], height, color=_AFTER, s=46, zorder=3, label="after" if height == 0 else None)
        title, sense = _TITLES[kind]
        axes.set_yticks(range(len(of_kind[kind])), [f"block {block}" for block, _ in of_kind[kind]])
        axes.set_ylim(-0.6, len(of_kind[kind]) - 0.4)
        low, high = axes.get_xlim()
        high = max(1.0, high) if kind == "cka" else max(high, 1.08 * axes.dataLim.xmax)  # a point is whole at the edge
        axes.set_xlim(min(0.0, low), high)
        axes.set_title(title, loc="left")
        axes.set_xlabel(sense)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle("The student's layers beside its teacher's", x=0.01, ha="left")
    return figure
