"""Requests before step 0: a small one that takes the whole way of a batch, and one that measures the link.

In: a teacher's source of labels and the rows of the run; out: nothing, or the labels that `auto` stands for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import torch

from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import LabelConfig
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.labels.service import LabelService
from student_trainer.labels.source import LabelRequest, LabelSource
from student_trainer.teachers.choose import Probe, choose
from student_trainer.teachers.loss_checks import is_softened
from student_trainer.teachers.rows.reading import Reading
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of


async def try_labels(
    source_of: Callable[[SignalSpec], LabelSource], spec: SignalSpec, data: TokenizedDataset, reading: Reading
) -> None:
    """Asks for the labels of the shortest row that the teacher is asked about, so that what cannot work fails before there is a run folder.

    Every row of it is checked, also where later requests have a sample checked, unless its labels are on disk.

    Raises:
        LabelError, TeacherWireError: as `LabelSource.labels`.
    """
    examples = [row.example for row in data if reading.responsible(row.example)]
    asked = reading.request([min(examples, key=lambda example: example.token_ids.size)])
    assert asked is not None
    if spec.extra_ids:
        named = np.tile(np.arange(spec.extra_ids, dtype=np.int32), (asked.batch.rows, 1))
        asked = replace(asked, batch=replace(asked.batch, extra_ids_NM=named))
    source = source_of(spec)
    if spec.check != "all" and not await source.has(asked):
        source = source_of(replace(spec, check="all"))
    await source.labels(asked)


async def choose_labels(
    client: TeacherClient,
    service: LabelService,
    info: TeacherInfo,
    rows: int,
    config: TrainConfig,
    data: TokenizedDataset,
    device: torch.device,
    reading: Reading,
    settings: LabelConfig,
) -> tuple[LabelConfig, str]:
    """The labels that `settings`, whose transport is `auto`, stand for, and why: by the link, measured with one request, and the memory that is free.

    Raises:
        ConfigError: as `choose`.
        TeacherWireError: the teacher does not answer the request.
    """
    probe = None
    asked = _probe(config, info, rows, data, reading) if "hidden" in info.transports else None
    if asked is not None:
        spec = spec_of("hidden", rows)
        began_s = time.perf_counter()
        signals = await client.score(info, spec, asked.batch)
        took_s = time.perf_counter() - began_s
        await service.source(info, spec).keep(asked, signals)
        timing = signals.timing
        server_s = (timing.queue_us + timing.forward_us + timing.reduce_us) / 1e6
        if timing.forward_us:  # else the server had them, and there is no forward pass to compare the link with
            probe = Probe(transfer_s=max(0.0, took_s - server_s), forward_s=timing.forward_us / 1e6)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    on_samples = config.loss.output is not None and config.loss.output.divergence == "pg_rkl"
    softened = is_softened(config.loss)
    return choose(info, rows, free, probe, softened=softened, on_samples=on_samples, settings=settings)


def _probe(
    config: TrainConfig, info: TeacherInfo, rows: int, data: TokenizedDataset, reading: Reading
) -> LabelRequest | None:
    """The first rows of a micro-batch's size that one request may hold, the shortest row if they are too long; None if that is too."""
    limits, row_bytes = info.limits, spec_of("hidden", rows).row_bytes(info.hidden_size, info.value_bytes)
    most_bytes = min(limits.max_reply_bytes, config.feed.window_mb << 20)

    def fits(examples: list[Example]) -> bool:
        views = [reading.view(example) for example in examples]
        return (
            len(views) <= limits.max_request_sequences
            and max(view.token_ids.size for view in views) <= limits.max_sequence_tokens
            and sum(view.token_ids.size for view in views) <= limits.max_request_tokens
            and sum(int(view.loss_mask.sum()) for view in views) * row_bytes <= most_bytes
        )

    asked = [row.example for row in data if reading.responsible(row.example)]
    if not asked:
        return None  # and what is said of such a teacher is the session's to say
    first = asked[: config.train.batch_size]
    shortest = min(asked, key=lambda example: example.token_ids.size)
    for examples in (*(first[:count] for count in range(len(first), 0, -1)), [shortest]):
        if fits(examples):
            return reading.request(examples)
    return None
