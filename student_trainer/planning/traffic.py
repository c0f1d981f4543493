"""What the labels of a run weigh and how long they take: bytes on disk and on the wire, and a short measurement against the teacher.

In: a session, the rows and their order; out: a `Traffic`. A few real requests are made, whose answers are measured and let go: neither
side keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.data.inputs import answer_bytes, bytes_on_disk, order_of
from student_trainer.labels import event_loop
from student_trainer.labels.source import LabelRequest
from student_trainer.planning.samples import spread
from student_trainer.teachers.session import TeacherSession

MEASURED = 3  # requests; the first alone would tell of a cold server
_LOOKED_UP = 256  # rows that the label store is asked for
_TOKEN_BYTES = 5  # of a request: id and flag


@dataclass(frozen=True)
class Measured:
    """Times of a few requests, each of one micro-batch of the run, one after another.

    Attributes:
        requests: how many.
        answer_s: median, from asking to the last byte.
        teacher_s: median of what of it the server says that it computed.
        tokens_per_s: tokens answered about, prompts included, per second of `answer_s`.
    """

    requests: int
    answer_s: float
    teacher_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Traffic:
    """Of one teacher.

    Attributes:
        name: in the run.
        kinds: of signals that it is asked for.
        rows, tokens, targets: that it is asked about in one epoch; targets are the supervised rows.
        epoch_bytes: of its answers about one epoch, on the wire, and of what it is asked.
        run_bytes: of the whole run, labels on disk and labels of rows that come again counted as they are served from disk.
        disk_bytes: that the labels of one epoch take in the label store; 0 if none are kept.
        on_disk: share of rows whose labels are there already, of those looked up.
        artifacts_bytes: of output head and others, fetched once a machine.
        measured: None if no request was made.
        run_s: for all requests of the run, if each takes as long as those measured and one follows the other; None without `measured`.
    """

    name: str
    kinds: tuple[str, ...]
    rows: int
    tokens: int
    targets: int
    epoch_bytes: int
    run_bytes: int
    disk_bytes: int
    on_disk: float
    artifacts_bytes: int
    measured: Measured | None
    run_s: float | None


def traffic_of(
    config: TrainConfig,
    session: TeacherSession,
    data: TokenizedDataset,
    told: Callable[[str], None] = lambda _: None,
) -> Traffic:
    """See module.

    Raises:
        TeacherWireError: the teacher does not answer, or refuses a micro-batch of this run.
    """
    asked = [row.example for row in data if session.responsible(row.example)]
    views = [session.reading.view(example) for example in asked]
    order = order_of(config, data)
    tokens = sum(view.token_ids.size for view in views)
    epoch = sum(answer_bytes(session.info, session.spec, view) for view in views) + _TOKEN_BYTES * tokens
    kept = session.service.store is not None and not session.spec.extra_ids
    disk = bytes_on_disk(session.info, session.spec, views) if kept else 0
    share = event_loop.run(_on_disk(session, asked)) if kept and asked else 0.0
    epochs = order.batches * order.batch_size / max(1, len(data))
    fits = kept and disk <= config.cache.max_gb * 2**30
    asked_epochs = (min(1.0, epochs) if fits else epochs) * (1 - share)
    told(f"measuring {session.name or session.info.name}")
    measured = event_loop.run(_measure(session, data, order.batch_size)) if asked else None
    requests = asked_epochs * max(1, len(asked)) / order.batch_size
    used = set(session.spec.kinds)
    artifacts = sum(
        artifact.bytes
        for artifact in session.info.artifacts
        if (artifact.kind == "output_head" and "hidden" in used)
        or (artifact.kind == "layer_basis" and session.features is not None and session.features.needs_basis)
    )
    return Traffic(
        session.name or session.info.name, tuple(session.spec.kinds), len(asked), tokens,
        sum(int(view.loss_mask.sum()) for view in views), epoch, round(epoch * asked_epochs), disk, share, artifacts, measured,
        None if measured is None else measured.answer_s * requests,
    )  # fmt: skip


async def _on_disk(session: TeacherSession, asked: Sequence[Example]) -> float:
    source = session.service.source(session.info, session.spec)
    looked = spread(len(asked), _LOOKED_UP)
    # The shortest row has been asked about just now, to see that it works.
    tried = min(range(len(asked)), key=lambda index: asked[index].token_ids.size)
    is_new = session.service.usage.teacher_sequences > 0
    found = 0
    for index in looked:
        if is_new and index == tried:
            continue
        request = session.request([asked[index]])
        found += request is not None and await source.has(request)
    return found / len(looked)


async def _measure(session: TeacherSession, data: TokenizedDataset, batch_size: int) -> Measured | None:
    requests = []
    for start in spread(max(1, len(data) - batch_size + 1), MEASURED):
        examples = [data[index].example for index in range(start, min(len(data), start + batch_size))]
        request = session.request(examples)
        requests += [request] if request is not None else []
    if not requests:
        return None
    answers, computed, tokens = [], [], 0
    async with session.service.connect() as client:
        for request in requests:
            batch = _named(request, session.spec.extra_ids).batch
            began_s = time.perf_counter()
            signals = await client.score(session.info, session.spec, batch, cache="none")
            answers.append(time.perf_counter() - began_s)
            timing = signals.timing
            computed.append((timing.forward_us + timing.reduce_us) / 1e6)
            tokens += batch.tokens
    whole_s = sum(answers)
    return Measured(len(answers), float(np.median(answers)), float(np.median(computed)), tokens / max(whole_s, 1e-9))


def _named(request: LabelRequest, extra_ids: int) -> LabelRequest:
    """With ids in the place of those that the student would name."""
    if not extra_ids:
        return request
    named = np.tile(np.arange(extra_ids, dtype=np.int32), (request.batch.rows, 1))
    return replace(request, batch=replace(request.batch, extra_ids_NM=named))
