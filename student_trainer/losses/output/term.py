"""The output loss as a term: distillation and the data's own tokens, over one chunked pass through the student's head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from student_trainer.losses.head import Head
from student_trainer.losses.output.joined.loss import JoinedLoss, joined_loss
from student_trainer.losses.output.loss import LossParts, output_loss
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.term import (
    JoinedLabels,
    Mean,
    Needs,
    StudentOutputs,
    SupervisedRows,
    TeacherLabels,
    TermResult,
)
from teacher_wire.core.signals import Signal


class OutputTerm:
    """See module.

    Args:
        spec_at: step -> what is computed.
        head: the student's output head as it is now, over the shared ids; asked once a micro-batch.
        signals: that it needs of the teacher; none for hard labels only.
        joining: of several teachers; None with one or none.
    """

    name = "output"

    def __init__(
        self,
        spec_at: Callable[[int], OutputLossSpec],
        head: Callable[[], Head],
        signals: tuple[Signal, ...] = (),
        joining: Joining | None = None,
    ) -> None:
        self._spec_at = spec_at
        self._head = head
        self._signals = signals
        self._joining = joining

    def needs(self) -> Needs:
        return Needs(self._signals)

    def term(
        self,
        outputs: StudentOutputs,
        labels: TeacherLabels | None,
        rows: SupervisedRows,
        normalizer: float | Tensor,
        step: int,
    ) -> TermResult:
        """`kd_loss` and `sft_loss` in nats per weight, `acc1` and `acc3` as shares of rows; with a policy gradient `clipped`, a share too.

        Rows that the student has sampled are in no `sft_loss`; `kd_loss` of a policy gradient is of these rows alone.

        Raises:
            ConfigError, DataError: as `output_loss`.
        """
        spec = self._spec_at(step)
        loss = output_loss(
            rows.of(outputs.final_BLD),
            self._head(),
            None if labels is None else labels.output,
            rows.labels_N,
            rows.weights_N,
            normalizer,
            spec,
            rows.sampled_logp_N,
        )
        return TermResult(loss.total, _figures(loss.parts, spec), loss.integrity)

    def joined(
        self,
        outputs: StudentOutputs,
        labels: JoinedLabels,
        rows: SupervisedRows,
        normalizer: float | Tensor,
        step: int,
    ) -> TermResult:
        """As `term`, and for each teacher NAME of the run: `kd_loss.NAME`, in nats per weight and share, over its distributions
        (not where these are mixed); `alm_loss.NAME`
        of a teacher with another tokenizer, over groups of tokens that are compared as a whole; `coverage.NAME`, the share of the
        supervised weight that has its labels; `agreement.NAME`, the share of its rows where the heaviest other teacher that has a
        distribution of them has the same likeliest id.

        Raises:
            ConfigError, DataError: as `joined_loss`.
        """
        spec = self._spec_at(step)
        joining = self._joining or Joining.of(labels)
        loss = joined_loss(
            rows.of(outputs.final_BLD),
            self._head(),
            labels,
            joining,
            rows.labels_N,
            rows.weights_N,
            normalizer,
            spec,
            rows.sampled_logp_N,
            rows.sequence_N,
        )
        return TermResult(loss.total, _figures(loss.parts, spec) | _by_teacher(loss, joining), loss.integrity)

    def likeliest_ids(self, outputs: StudentOutputs, rows: SupervisedRows, count: int, step: int) -> Tensor:
        """int64 [N, count], the student's own likeliest ids of each row, for labels that shall name them (docs/concepts/method.md 2.1)."""
        head = self._head()
        chunk_rows = self._spec_at(step).chunk_rows(head.vocab_rows)
        chunks = rows.of(outputs.final_BLD).split(chunk_rows)
        return torch.cat([head.logits(chunk_CD).topk(count, dim=-1).indices for chunk_CD in chunks])


def _figures(parts: LossParts, spec: OutputLossSpec) -> dict[str, Mean]:
    """Of the whole."""
    figures = {
        "kd_loss": Mean(parts.kd_sum, parts.kd_weights),
        "sft_loss": Mean(parts.ce_sum, parts.ce_weights),
        "acc1": Mean(parts.acc1_hits, parts.rows),
        "acc3": Mean(parts.acc3_hits, parts.rows),
    }
    if spec.policy_gradient is not None:
        figures["clipped"] = Mean(parts.clipped, parts.kd_weights)
    return figures


def _by_teacher(loss: JoinedLoss, joining: Joining) -> dict[str, Mean]:
    """Of each teacher of the run, whether it has answered or not."""
    figures = {}
    for name, found in loss.by_teacher.items():
        if joining.combine != "prob_mix":
            figures[f"kd_loss.{name}"] = Mean(found.kd_sum, found.kd_weights)
        if name in joining.bridged:
            figures[f"alm_loss.{name}"] = Mean(found.alm_sum, found.alm_weights)
        figures[f"coverage.{name}"] = Mean(found.covered, loss.parts.weights)
        figures[f"agreement.{name}"] = Mean(found.agreeing, found.compared)
    return figures
