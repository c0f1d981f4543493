"""What to change when samples are rejected, by the reason that stands out.

In: the counts of a run and its config; out: one line that names the reason, how often it came, and the settings that help; or "" where no reason
stands out. It reads counts alone and changes nothing.
"""

from __future__ import annotations

from typing import cast

from student_trainer.config.traces import TracesConfig
from student_trainer.data.trace_schema import Reason
from student_trainer.errors import RunError
from student_trainer.traces.folder import Stats

DOMINANT_SHARE = 0.4  # of the rejected samples
TROUBLING_SHARE = 0.2  # of all samples; fewer are a teacher's ordinary mistakes


def advice(stats: Stats, config: TracesConfig) -> str:
    """One line about the reason that most rejected samples have."""
    rejected = stats.samples - stats.accepted
    if not rejected or rejected < TROUBLING_SHARE * stats.samples:
        return ""
    reason, count = max(stats.rejected.items(), key=lambda pair: pair[1])
    if count < DOMINANT_SHARE * rejected:
        return ""
    return f"{count:,} of {rejected:,} rejected samples are {reason}: {_help(cast(Reason, reason), config)}"


def nothing_accepted(teacher: str, stats: Stats, config: TracesConfig) -> RunError:
    """The end of a run that accepted no sample at all."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in stats.rejected.items())
    return RunError(
        f"teacher {teacher!r}: none of {stats.samples:,} samples was accepted ({reasons}); nothing was learned of its reasoning: "
        f"{config.output_dir}/quarantine.jsonl holds every sample with its reason; change what it says and choose another output_dir"
    )


def _help(reason: Reason, config: TracesConfig) -> str:
    sampling = config.sampling
    cooler = f"lower sampling.temperature (now {sampling.temperature:g})"
    shown = "show a worked example in the form you want (data.examples: a list of {prompt, reply}" + (
        ")" if config.examples else ", or data.builtin_examples=true)"
    )
    longer = f"raise sampling.max_new_tokens (now {sampling.max_new_tokens:,})"
    form = (
        "try style=steps or quotes, whose grammar holds it to the form" if config.style == "free" else "try style=free"
    )
    no_quotes = "style=steps asks for no quotes; else " if config.style in ("quotes", "offsets") else ""
    if reason == "unfinished":
        if config.held_to_schema and sampling.fit_budget:
            return f"{longer} (the grammar's bounds grow with it), lower caps.steps, or {cooler}"
        bounded = "set sampling.fit_budget=true" if config.held_to_schema else form
        return f"{longer}, {bounded}, or {shown}"
    table: dict[Reason, str] = {
        "cut_text": f"{longer}, or lower caps.steps, which leaves each step more",
        "too_long": "raise caps (steps, step_bytes, evidence, evidence_bytes, answer_bytes), or ask for less in data.instruction",
        "invented_evidence": f"it quotes what the prompt does not say: {no_quotes}{cooler}, or {shown}",
        "bad_reference": f"its ids do not fit together: style=quotes asks for none; else {shown}",
        "cyclic_dependency": f"its ids do not fit together: style=quotes asks for none; else {shown}",
        "wrong_answer": f"it does not know enough for these questions: a stronger teacher, easier questions, or {cooler}; if its answers are right "
        f"but worded otherwise, {shown}",
        "minority_answer": f"its samples are at odds: {cooler}, raise sampling.samples (now {sampling.samples}), or give known answers",
        "wrong_arithmetic": f"its steps hold false equations: a stronger teacher, or {cooler}",
        "wrong_prompt": "it names another prompt's digest: it must not write prompt_sha256",
        "nul": f"{cooler}, or {form}",
    }
    return table.get(reason, f"it does not keep to the form: {shown}, {form}, or {cooler}")
