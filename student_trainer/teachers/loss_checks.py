"""Which losses the labels of a run can give: refusals and advice about a config, before a teacher is asked.

In: the loss and label sections of a config; out: a `Finding`, and the divergence and schedules that the section means.
"""

from __future__ import annotations

from collections.abc import Iterator

from student_trainer.config.features import FeatureConfig
from student_trainer.config.losses import LossConfig, OutputLossConfig, ScheduleConfig
from student_trainer.config.teachers import LabelConfig
from student_trainer.findings import Finding
from student_trainer.losses.divergence import Divergence, advice
from student_trainer.losses.truncated import check_temperature
from student_trainer.schedules import Schedule


def check_loss(loss: LossConfig, labels: LabelConfig) -> Iterator[Finding]:
    """Whether these labels can give this loss, with advice on a loss that is legal but rarely meant."""
    output = loss.output
    if output is None:
        return
    try:
        divergence = divergence_of(output)
        schedule = temperature_of(output)
        for temperature in (schedule.start, schedule.end):
            check_temperature(labels.transport, temperature, output.tempered_head)
    except ValueError as error:
        setting = f"loss.preset={loss.preset}: loss.output" if loss.preset else "loss.output"
        yield Finding.bad("loss.output", f"{setting}: {error}")
        return
    yield Finding.good(
        "loss.output", f"{output.divergence} can be computed from {labels.transport} labels", advice(divergence) or ""
    )


def check_anneal(loss: LossConfig, run_steps: int) -> Iterator[Finding]:
    """Whether weights that fall to 0 get there within the run."""
    for name, section in loss.features.items():
        steps = section.anneal.steps if section.anneal else None
        if steps is None:
            continue
        setting = f"loss.{name}.anneal.steps"
        if steps > run_steps:
            what = f"{setting}={steps} is longer than the run of {run_steps:,} steps, so its weight would not reach 0"
            yield Finding.bad(setting, what, f"at most {run_steps}, or anneal: {{share: 1}}")
        else:
            yield Finding.good(setting, f"{setting}={steps} ends within the run")


def anneal_steps(section: FeatureConfig, run_steps: int) -> int:
    """Optimizer steps until the weight of a term is 0; 0 if it stays."""
    if section.anneal is None:
        return 0
    return section.anneal.steps or max(1, round((section.anneal.share or 1) * run_steps))


def is_softened(loss: LossConfig) -> bool:
    """Whether the output loss ever has a temperature other than 1."""
    if loss.output is None:
        return False
    schedule = temperature_of(loss.output)
    return (schedule.start, schedule.end) != (1.0, 1.0)


def divergence_of(output: OutputLossConfig) -> Divergence:
    """The divergence that a config names, with the default of its parameters."""
    alpha = output.alpha if output.alpha is not None else (0.5 if output.divergence == "adaptive_kl" else 0.1)
    return Divergence(output.divergence, output.beta, alpha, output.normalization)


def temperature_of(output: OutputLossConfig, run_steps: int = 1) -> Schedule:
    """The temperature as a function of the step; `run_steps`, of the whole run, decide how long one takes that is a share of them."""
    temperature = output.temperature
    if isinstance(temperature, ScheduleConfig):
        steps = temperature.steps or max(1, round((temperature.share or 1) * run_steps))
        return Schedule(temperature.kind, temperature.start, temperature.end, steps)
    return Schedule("constant", temperature, temperature, 1)


def has_tau_squared(output: OutputLossConfig) -> bool:
    """Without it a temperature schedule would be a learning-rate schedule (algorithms.md 1.4)."""
    if output.tau_squared is not None:
        return output.tau_squared
    return isinstance(output.temperature, ScheduleConfig) and output.temperature.kind != "constant"
