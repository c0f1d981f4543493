"""Which losses the labels of a run can give: refusals and advice about a config, before a teacher is asked.

In: the loss and label sections of a config; out: a `Finding`, and the divergence and schedules that the section means.
"""

from __future__ import annotations

from collections.abc import Iterator

from student_trainer.config.features import FeatureConfig
from student_trainer.config.losses import OUTPUT_DEFAULTS, LossConfig, OutputLossConfig, ScheduleConfig
from student_trainer.config.on_policy import OnPolicyConfig, ShareConfig
from student_trainer.config.teachers import ContextConfig, LabelConfig
from student_trainer.findings import Finding
from student_trainer.losses.divergence import Divergence, advice
from student_trainer.losses.output.policy_gradient import PolicyGradient
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.truncated import check_temperature
from student_trainer.schedules import Schedule


def check_loss(loss: LossConfig, labels: LabelConfig) -> Iterator[Finding]:
    """Whether these labels can give this loss, with advice on a loss that is legal but rarely meant."""
    output = loss.output
    if output is None:
        return
    if labels.transport == "given" and output.divergence != "pg_rkl":
        yield Finding.bad(
            "labels.transport",
            f"labels.transport=given holds no distribution, which {output.divergence} needs",
            "hidden, top_k or full, or loss.output.divergence=pg_rkl",
            joint=": ",
        )
        return
    try:
        divergence = divergence_of(output)
        schedule = temperature_of(output)
        for temperature in (schedule.start, schedule.end):
            check_temperature(labels.transport, temperature, output.tempered_head)
            OutputLossSpec(
                temperature=temperature, tempered_head=output.tempered_head, policy_gradient=policy_gradient_of(output)
            )
    except ValueError as error:
        setting = f"loss.preset={loss.preset}: loss.output" if loss.preset else "loss.output"
        yield Finding.bad("loss.output", f"{setting}: {error}")
        return
    yield Finding.good(
        "loss.output", f"{output.divergence} can be computed from {labels.transport} labels", advice(divergence) or ""
    )


def check_policy_gradient(loss: LossConfig, labels: LabelConfig, on_policy: OnPolicyConfig | None) -> Iterator[Finding]:
    """Whether a policy gradient has samples to learn from whose expectation is the reverse KL, and data rows something else."""
    output = loss.output
    if output is None or output.divergence != "pg_rkl":
        return
    setting = "loss.output.divergence"
    if on_policy is None:
        yield Finding.bad(
            setting,
            f"{setting}=pg_rkl learns from the student's own samples alone",
            "set the section on_policy",
            joint=": ",
        )
        return
    if on_policy.temperature != 1:
        yield Finding.bad(
            "on_policy.temperature",
            f"on_policy.temperature={on_policy.temperature:g}: pg_rkl weighs samples by the probabilities at temperature 1",
            "set it to 1, or take reverse_kl, which is right for samples of any temperature",
        )
    if labels.extra_ids:
        yield Finding.bad(
            "labels.extra_ids",
            f"labels.extra_ids={labels.extra_ids}: pg_rkl reads nothing but the sampled token",
            "0",
            joint=": ",
        )
    if always_on_policy(on_policy) or loss.sft_weight or loss.features:
        off_policy = "" if always_on_policy(on_policy) else "; rows of the data learn from the other terms of the loss"
        advice = (
            f"on_policy.top_p={on_policy.top_p:g}: the samples of pg_rkl are then not the student's distribution, and its gradient "
            "not that of the reverse KL"
        )
        yield Finding.good(
            setting, f"pg_rkl has samples to learn from{off_policy}", advice if on_policy.top_p < 1 else ""
        )
    else:
        yield Finding.bad(
            "on_policy.share",
            "on_policy.share is below 1 for a part of the run, and its rows of the data would teach nothing: pg_rkl is of the "
            "student's samples, and loss.sft_weight is 0",
            "on_policy.share=1, or loss.sft_weight above 0",
        )


def check_context(loss: LossConfig, context: ContextConfig | None) -> Iterator[Finding]:
    """Whether the losses can be joined by position where teacher and student read different prompts."""
    if context is None:
        return
    if "attention" in loss.features:
        yield Finding.bad(
            "loss.attention",
            "loss.attention compares where both look in one text, and with teacher.context they read different ones",
            "set one of the two to null",
        )
    else:
        yield Finding.good("teacher.context", f"the teacher alone reads the field {context.field!r} of each row")


def always_on_policy(on_policy: OnPolicyConfig) -> bool:
    """Whether every sequence of the run is the student's own, but for prompts that get no completion."""
    share = on_policy.share
    if not isinstance(share, ShareConfig):
        return share == 1
    return share.end == 1 and (share.start == 1 or (share.warmup == 0 and share.ramp == 0))


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
    """The divergence that a config names, with the default of its parameters; of `pg_rkl` the one that it estimates."""
    alpha = output.alpha if output.alpha is not None else (0.5 if output.divergence == "adaptive_kl" else 0.1)
    kind = "reverse_kl" if output.divergence == "pg_rkl" else output.divergence
    beta = OUTPUT_DEFAULTS["beta"] if output.beta is None else output.beta
    return Divergence(kind, beta, alpha, output.normalization or OUTPUT_DEFAULTS["normalization"])


def policy_gradient_of(output: OutputLossConfig) -> PolicyGradient | None:
    """How `pg_rkl` clips; None for a divergence."""
    if output.divergence != "pg_rkl":
        return None
    return PolicyGradient() if output.clip is None else PolicyGradient(output.clip)


def temperature_of(output: OutputLossConfig, run_steps: int = 1) -> Schedule:
    """The temperature as a function of the step; `run_steps`, of the whole run, decide how long one takes that is a share of them."""
    temperature = output.temperature
    if isinstance(temperature, ScheduleConfig):
        steps = temperature.steps or max(1, round((temperature.share or 1) * run_steps))
        return Schedule(temperature.kind, temperature.start, temperature.end, steps)
    return Schedule("constant", temperature, temperature, 1)


def has_tau_squared(output: OutputLossConfig) -> bool:
    """Without it a temperature schedule would be a learning-rate schedule (docs/concepts/method.md 1.4)."""
    if output.tau_squared is not None:
        return output.tau_squared
    return isinstance(output.temperature, ScheduleConfig) and output.temperature.kind != "constant"
