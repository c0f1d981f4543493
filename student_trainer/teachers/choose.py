"""Which labels to ask for: those of `labels.transport: auto`, and the exact ones that held-out rows are measured with.

In: what the teacher offers, free memory, a measured probe; out: a LabelConfig, and for `auto` one sentence. Policy over numbers: it asks nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import LabelConfig
from student_trainer.data.batch_plan import by_length
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.errors import ConfigError
from student_trainer.teachers.rows.reading import Reading
from teacher_wire.core.info import TeacherInfo
from teacher_wire.score.signals import spec_of

HEAD_SHARE = 0.25  # of the free memory: the rest is the student's activations and optimizer


@dataclass(frozen=True)
class Probe:
    """One request for hidden states, measured.

    Attributes:
        transfer_s: seconds it took beyond the server's own work.
        forward_s: seconds of the teacher's forward pass.
    """

    transfer_s: float
    forward_s: float


def choose(
    info: TeacherInfo,
    vocab_rows: int,
    free_bytes: int,
    probe: Probe | None,
    *,
    softened: bool,
    settings: LabelConfig,
    on_samples: bool = False,
) -> tuple[LabelConfig, str]:
    """The labels to ask for.

    Args:
        info: the teacher.
        vocab_rows: V, the shared vocabulary.
        free_bytes: memory free on the student's device, the student loaded.
        probe: of the link; None if the teacher offers no hidden states, or had them already.
        on_samples: whether the loss is a policy gradient, which reads the teacher's word on the sampled tokens alone.
        softened: whether the loss has a temperature other than 1, which only exact labels can serve.
        settings: of `auto`; their `k` counts if it comes to `top_k` or `given` (where it measures), their `check` if it comes to `hidden`.

    Raises:
        ConfigError: nothing this teacher offers can serve the loss on this card.
    """
    offered = info.transports
    if on_samples and "given" in offered:
        given_row = spec_of("given", vocab_rows).row_bytes(info.hidden_size, info.value_bytes)
        return LabelConfig(
            transport="given", k=settings.k
        ), f"pg_rkl needs no more of the teacher: {given_row} bytes per token"
    full_row = spec_of("full", vocab_rows).row_bytes(info.hidden_size, info.value_bytes)
    hidden_row = spec_of("hidden", vocab_rows).row_bytes(info.hidden_size, info.value_bytes)
    if "full" in offered and full_row <= hidden_row:
        return LabelConfig(
            transport="full"
        ), f"every logit takes {full_row:,} bytes per token, no more than the state's {hidden_row:,}"
    head_bytes = vocab_rows * info.hidden_size * info.value_bytes
    fits = head_bytes <= HEAD_SHARE * free_bytes
    if "hidden" in offered and fits:
        why = f"the teacher's head takes {_mib(head_bytes)} of {_mib(free_bytes)} free"
        if probe is not None and probe.transfer_s > max(probe.forward_s, 1e-9):
            ratio = probe.transfer_s / max(probe.forward_s, 1e-9)
            return (
                LabelConfig(transport="hidden", compression="int8", check=settings.check),
                f"{why}; int8, since the link is {ratio:.1f} times slower than the teacher",
            )
        return LabelConfig(transport="hidden", check=settings.check), f"{why}; exact, {hidden_row:,} bytes per token"
    missing = (
        "the teacher does not offer hidden states"
        if "hidden" not in offered
        else f"its head ({_mib(head_bytes)}) is more than a quarter of the {_mib(free_bytes)} free"
    )
    if "full" in offered and softened:
        return LabelConfig(
            transport="full"
        ), f"{missing}, and the temperature needs exact labels: every logit, {full_row:,} bytes per token"
    if softened or "top_k" not in offered:
        raise ConfigError(
            f"labels.transport=auto: {missing}, and nothing else that teacher {info.name!r} offers serves this loss"
        )
    k = min(settings.k, vocab_rows, info.limits.max_k)
    return LabelConfig(
        transport="top_k", k=k
    ), f"{missing}: top {k} with the exact tail mass, which is not exact but close at temperature 1"


def measured_by(
    config: TrainConfig,
    info: TeacherInfo,
    labels: LabelConfig,
    vocab_rows: int,
    held_out: TokenizedDataset,
    reading: Reading,
) -> LabelConfig:
    """Labels to measure with: exact ones if `labels.transport` and the teacher allow any.

    Only `hidden` may put the teacher's head on the card. Beside it, all logits of a batch are exact, where one request may hold them.
    """
    if labels.transport == "hidden" and "hidden" in info.transports:
        return LabelConfig(transport="hidden", check="all")  # the teacher's own likelihood is measured too
    asked = [row.example if reading.responsible(row.example) else None for row in held_out]
    rows = [0 if example is None else int(reading.view(example).loss_mask.sum()) for example in asked]
    most = max(sum(rows[i] for i in group) for group in by_length(held_out, config.train.eval_batch_size))
    needed = most * spec_of("full", vocab_rows).row_bytes(info.hidden_size, info.value_bytes)
    fits = needed <= min(info.limits.max_reply_bytes, config.feed.window_mb << 20)
    if "full" in info.transports and (fits or labels.transport == "full"):
        return LabelConfig(transport="full")
    if "top_k" in info.transports:
        return LabelConfig(transport="top_k", k=min(labels.k, vocab_rows, info.limits.max_k))
    return labels if not labels.extra_ids else LabelConfig(transport="top_k", k=labels.k)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
