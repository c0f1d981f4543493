"""Sizes of every request of a run against the limits of its teachers and our own window, before step 0.

In: a session, the rows and their order; out: a `Finding` per kind of request and limit, by the setting that makes requests too large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import RunOrder, by_length
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import answer_bytes
from student_trainer.findings import Finding
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.signals import SignalSpec


def check_sizes(
    config: TrainConfig,
    sessions: Sequence[TeacherSession],
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    order: RunOrder,
) -> Iterator[Finding]:
    """Whether the teachers and our own window take every request of the run, to whichever step."""
    for session in sessions:
        if config.loss.output is not None:
            groups = [order.batch(number) for number in range(order.batches)]
            yield from check_groups(config, session, session.spec, data, groups, "train.batch_size")
        if held_out is not None and session.measuring is not None:
            groups = by_length(held_out, config.train.eval_batch_size)
            yield from check_groups(config, session, session.measuring, held_out, groups, "train.eval_batch_size")


def check_groups(
    config: TrainConfig,
    session: TeacherSession,
    spec: SignalSpec,
    data: TokenizedDataset,
    groups: list[list[int]],
    setting: str,
) -> Iterator[Finding]:
    """Whether a teacher and our own window take requests that hold these groups of rows; `setting` is what makes them large."""
    asked = {row.index: session.reading.view(row.example) for row in data if session.responsible(row.example)}
    tokens = {index: view.token_ids.size for index, view in asked.items()}
    replies = {index: answer_bytes(session.info, spec, view) for index, view in asked.items()}
    groups = [some for group in groups if (some := [index for index in group if index in asked])]
    if not groups:
        return
    limits = session.info.limits
    reply = max(sum(replies[index] for index in group) for group in groups)
    most_tokens = max(sum(tokens[index] for index in group) for group in groups)
    for what, value, limit, whose in (
        ("sequences", max(map(len, groups)), limits.max_request_sequences, "the teacher's max_request_sequences"),
        ("tokens", most_tokens, limits.max_request_tokens, "the teacher's max_request_tokens"),
        ("reply bytes", reply, limits.max_reply_bytes, "the teacher's max_reply_mb"),
        ("reply bytes", reply, config.feed.window_mb << 20, "feed.window_mb"),
    ):
        made = f"{setting} makes a request of {value:,} {what} by {spec.name} labels"
        if value > limit:
            yield Finding.bad(setting, f"{made}, above {whose}", f"at most {limit:,}", joint=": ")
        else:
            yield Finding.good(setting, f"{made}, within {whose} ({limit:,})")
