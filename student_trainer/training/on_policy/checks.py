"""What can be wrong with `on_policy` before step 0, a `Finding` per check, by the name of the setting.

In: config, rows, teachers; out: findings. A prompt that no completion fits behind is refused, or left to the policy of `on_failure`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from student_trainer.config.on_policy import OnPolicyConfig
from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.findings import Finding
from student_trainer.rollout.engines.vllm_room import no_such_gpu
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.prompts import Room, prompt_length
from student_trainer.teachers.limits import check_groups
from student_trainer.teachers.session import TeacherSession


def plan_of(config: TrainConfig, order: RunOrder) -> RolloutPlan | None:
    """The rollouts of a run; None for one without."""
    if config.on_policy is None:
        return None
    window = order.batch_size * order.accumulation
    return RolloutPlan(config.on_policy, seed=config.run.seed, steps=order.steps, window=window)


def room_of(settings: OnPolicyConfig, positions: int | None, teachers: Sequence[TeacherSession]) -> Room:
    """How long sequences may become, of a student with so many positions, for all of these teachers."""
    taken = min((teacher.info.limits.max_sequence_tokens for teacher in teachers), default=None)
    return Room(settings.max_new_tokens, positions, taken)


def check_on_policy(config: TrainConfig) -> Iterator[Finding]:
    """What can be told from the config and this machine alone."""
    if config.on_policy is None:
        return
    if not config.every_teacher:
        yield Finding.bad(
            "on_policy", "on_policy: needs a teacher, whose labels rollouts are learned from", "set the section teacher"
        )
        return
    if config.loss.output is None and config.on_policy.share != 0:  # a share of 0 may be there to publish alone
        yield Finding.bad(
            "on_policy",
            "on_policy: needs loss.output, by which rollouts are learned from, and it is null",
            "set loss.output, or leave on_policy out",
        )
        return
    if missing := no_such_gpu(config.on_policy.device):
        yield Finding.bad("on_policy.device", missing, "set it to one of them, or to null for the student's own")
        return
    yield Finding.good("on_policy", "rollouts have a teacher and a loss")


def check_rollouts(
    config: TrainConfig,
    positions: int | None,
    data: TokenizedDataset,
    order: RunOrder,
    sessions: Sequence[TeacherSession],
) -> Iterator[Finding]:
    """Whether there are prompts, whether completions fit behind them, and whether the teachers take the requests that hold them.

    Args:
        config: the run.
        positions: that the student knows; None for no limit.
        data, order: the rows and their order.
        sessions: of the run's teachers.
    """
    settings, plan = config.on_policy, plan_of(config, order)
    if settings is None or plan is None:
        return
    if settings.publish is not None and settings.publish.every > order.steps:
        what = f"on_policy.publish.every={settings.publish.every:,} is more than the {order.steps:,} steps of the run"
        yield Finding.good("on_policy.publish.every", what, f"{what}: nothing is published")
    if not plan.has_any:
        what = "on_policy.share: no sequence of the run is a rollout"
        yield Finding.good("on_policy.share", what, f"{what}: it is learned off-policy alone")
        return
    room = room_of(settings, positions, sessions)
    why = [room.hindrance(row.example) for row in data]
    bad = [number for number, told in enumerate(why) if told]
    if bad:
        yield _unanswerable(settings, data, bad, why[bad[0]])
    else:
        yield Finding.good("on_policy.max_new_tokens", f"a completion fits behind each of the {len(data):,} prompts")
    if len(bad) == len(data):
        return
    for session in sessions:
        grown = [
            row.example if told else _at_most(row.example, settings.max_new_tokens)
            for row, told in zip(data, why, strict=True)
        ]
        groups = [order.batch(number) for number in range(order.batches)]
        if settings.samples_per_prompt > 1:  # of one prompt, whichever it is
            heaviest = max(range(len(grown)), key=lambda number: grown[number].token_ids.size)
            groups = [[heaviest] * order.batch_size]
        yield from check_groups(
            config, session, session.spec, TokenizedDataset(grown), groups, "on_policy.max_new_tokens"
        )


def _unanswerable(settings: OnPolicyConfig, data: TokenizedDataset, bad: list[int], why: str) -> Finding:
    setting = "on_policy.max_new_tokens"
    first = f"{data[bad[0]].example.key}: {why}"
    if len(bad) == len(data):
        what = f"on_policy: none of the {len(data):,} rows can be answered; {first}"
        return Finding.bad(setting, what, "lower on_policy.max_new_tokens, or shorten the prompts")
    what = f"on_policy: {len(bad):,} of the {len(data):,} rows cannot be answered; {first}"
    if settings.on_failure == "stop":
        return Finding.bad(
            setting, what, "take them out, lower on_policy.max_new_tokens, or set on_policy.on_failure=skip"
        )
    return Finding.good(setting, what, f"{what}; where they are drawn, the rows are learned from as they are")


def _at_most(example: Example, max_new_tokens: int) -> Example:
    """An example with as many tokens and targets as the teacher is asked about in a row or in the longest rollout in its place."""
    tokens = max(example.asked.token_ids.size, prompt_length(example.asked) + max_new_tokens)
    targets = max(int(example.loss_mask.sum()), max_new_tokens)
    mask = np.zeros(tokens, np.bool_)
    mask[-targets:] = True
    return Example(np.zeros(tokens, np.int32), mask, 0, example.key)
