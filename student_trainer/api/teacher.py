"""A connection to one teacher for loops that are not ours: labels of padded batches, at once, awaited, or asked for ahead.

In: an address and what proves who we are; out: `Teacher`. Everything that speaks to a server runs on the student's one event loop
(`labels/event_loop.py`), so these methods may be called from any thread, with or without a loop of the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

from student_trainer.api.labels import AskedBatch, Labels
from student_trainer.config.files import parse_as
from student_trainer.config.run import cache_folder, labels_folder
from student_trainer.config.teachers import LabelConfig, TeacherConfig
from student_trainer.errors import ConfigError, DataError, RunError
from student_trainer.findings import Findings
from student_trainer.labels import event_loop
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.rows_on_device import head_on, with_checked_rows
from student_trainer.labels.service import LabelService
from student_trainer.labels.source import LabelUsage
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Tally
from student_trainer.teachers.artifact_cache import fetch_head
from student_trainer.teachers.connect import Connection
from student_trainer.teachers.handshake import StudentFacts, agree
from teacher_wire.artifacts.kinds.output_head import TeacherHead
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.labels.store import LabelStore
from teacher_wire.transport.channel import check_connection

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
Transport = Literal["hidden", "top_k", "full"]
_GB = 2**30


def connect(
    address: str,
    *,
    token: str | None = None,
    name: str = "",
    tokenizer: Any = None,
    vocab_rows: int | None = None,
    transport: Transport = "hidden",
    k: int = 128,
    compression: Literal["none", "int8"] = "none",
    check: Literal["sampled", "all"] = "sampled",
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    tenant: str = "",
    proxy: str = "auto",
    wait_s: float = 5.0,
    retry_s: float = 300.0,
    answer_s: float = 600.0,
    cache_dir: str | Path = "~/.cache/lyceum",
    keep_labels: bool = True,
    max_gb: float = 50.0,
    on_trouble: Callable[[TeacherWireError], None] | None = None,
) -> Teacher:
    """Connects to a teacher and agrees with it on how its labels travel; for `hidden` its output head is fetched, once per machine.

    Args:
        address: HOST:PORT of a server; several with commas are edges of one server.
        token: credential; sent only over TLS or to this machine. None takes $LYCEUM_TOKEN, "" sends none.
        name: which teacher of the server; may be left out where it has one.
        tokenizer: the student's fast tokenizer, to be compared with the teacher's. None skips the comparison with a
            warning; the caller must then guarantee that ids mean the same on both sides.
        vocab_rows: ids that the student's output head has, if fewer than the teacher's; None for at least as many.
        transport, k, compression, check: as of the section `labels` of a run (docs/concepts/labels.md).
        ca_file, cert_file, key_file, tenant, proxy, wait_s, retry_s, answer_s: as of the section `teacher` of a run; times in seconds.
        cache_dir: where the output head and the labels are kept, shared with the runs of this machine.
        keep_labels: keep labels on disk and use those that are there; later epochs and runs then cost the teacher nothing.
        max_gb: budget of the labels on disk.
        on_trouble: called, on another thread, with each error after which a request is made again; None logs a warning.

    Returns:
        The teacher. Close it, or use it in a `with` block.

    Raises:
        ConfigError: an invalid argument.
        UnavailableError: nobody answered for `wait_s`.
        AuthenticationError, NotFoundError, MismatchError, CapabilityError, RequestError: the server or the teacher refuses or does not support
            the request.
    """
    settings = parse_as(
        TeacherConfig,
        {
            "address": address, "name": name, "ca_file": ca_file, "cert_file": cert_file, "key_file": key_file,
            "tenant": tenant, "proxy": proxy, "wait_s": wait_s, "retry_s": retry_s, "answer_s": answer_s,
        },
        "connect",
    )  # fmt: skip
    if transport not in ("hidden", "top_k", "full"):
        raise ConfigError(f"connect: transport must be hidden, top_k or full, not {transport!r}")
    wanted = {"transport": transport, "compression": compression, "check": check, "k": k}
    how = parse_as(LabelConfig, wanted, "connect")
    connection = Connection.of(settings, address)
    if token is not None:
        connection = replace(connection, credentials=replace(connection.credentials, token=token))
    check_connection(address, connection.credentials)
    folder = cache_folder(Path(cache_dir))
    told = on_trouble or (lambda error: log.warning("%s; trying again", error))
    if tokenizer is None:
        warnings.warn(
            "connect: no tokenizer was given, so it is not compared with the teacher's; pass tokenizer=... to be sure that "
            "ids mean the same on both sides",
            stacklevel=2,
        )

    async def begin() -> tuple[TeacherInfo, SignalSpec, TeacherHead | None]:
        async with connection.client(told) as client:
            info = await connection.describe(client)
            spec = _agree(info, tokenizer, vocab_rows, how)
            if how.transport != "hidden":
                return info, spec, None
            return info, spec, await fetch_head(client, info, folder, max_bytes=20 * _GB)

    info, spec, head = event_loop.run(begin())
    store = LabelStore(labels_folder(folder), round(max_gb * _GB), log.warning) if keep_labels else None
    return Teacher(connection.address, info, spec, how, head, LabelService(lambda: connection.client(told), store))


def _agree(info: TeacherInfo, tokenizer: Any, vocab_rows: int | None, how: LabelConfig) -> SignalSpec:
    """The signal, by the same comparison as a run's; without a tokenizer of ours the teacher's own facts stand for it."""
    rows = info.vocab_rows if vocab_rows is None else vocab_rows
    if rows < 1:
        raise ConfigError(f"connect: vocab_rows must be at least 1, not {rows}")
    if tokenizer is None:
        facts = StudentFacts(rows, info.tokenizer_size, info.tokenizer_sha256, info.chat_template_sha256, False)
    elif not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(
            f"connect: tokenizer must be a fast tokenizer of transformers, not {type(tokenizer).__name__}"
        )
    else:
        # Which ids will be asked about is not known here, so added tokens that differ cannot be excused by the data.
        facts = replace(StudentFacts.of(tokenizer, rows, False), tokens=None)
    spec = agree(info, facts, how, Findings(), asked_by="connect", longest=("", 0))
    assert spec is not None, "findings that stop raise"
    return spec


class Teacher:
    """One teacher, ready to be asked; made by `connect`.

    Attributes:
        address: of its server.
        info: its own description: model, fingerprint, limits.
        vocab_rows: V, ids 0..V-1 that labels are over.
        transport: "hidden", "top_k" or "full".
    """

    def __init__(
        self,
        address: str,
        info: TeacherInfo,
        spec: SignalSpec,
        how: LabelConfig,
        head: TeacherHead | None,
        service: LabelService,
    ) -> None:
        self.address = address
        self.info = info
        self.vocab_rows = spec.vocab_rows
        self.transport = how.transport
        self._spec = spec
        self._head = head
        self._heads: dict[torch.device, Head] = {}
        self._service = service
        self._source = service.source(info, spec)
        self._tally = Tally()
        self._closed = False

    def __enter__(self) -> Teacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Teacher {self.info.name!r} at {self.address}: {self.info.model}, labels by {self._spec.name}>"

    def close(self) -> None:
        """Ends the connection; requests that are under way fail with CancelledRequestError. May be called twice."""
        if not self._closed:
            self._closed = True
            event_loop.run(self._source.__aexit__())

    @property
    def usage(self) -> LabelUsage:
        """Sequences and tokens whose labels were on disk, and those that the teacher was asked for, so far."""
        return self._service.usage

    def labels(self, input_ids: Any, loss_mask: Any) -> Labels:
        """The labels of a right-padded batch; waits for them.

        Args:
            input_ids: integers [B, L]: a tensor on any device, an array, or lists of one length.
            loss_mask: [B, L], true at the tokens that are to be learned, such as `batch["labels"] != -100`.

        Raises:
            DataError: a batch that cannot be asked about.
            RequestError, LimitError: a sequence beyond what this teacher takes.
            LabelError: an answer that must not be learned from.
            MismatchError: another teacher, or other weights, behind the address now.
            UnavailableError, OverloadedError: nobody answered for `retry_s`.
        """
        return event_loop.run(self._ask(AskedBatch.of(input_ids, loss_mask)))

    async def labels_async(self, input_ids: Any, loss_mask: Any) -> Labels:
        """As `labels`, for a caller with an event loop of its own, which goes on meanwhile."""
        return await asyncio.wrap_future(event_loop.start(self._ask(AskedBatch.of(input_ids, loss_mask))))

    def ahead(
        self,
        batches: Iterable[Batch],
        *,
        masks: Callable[[Batch], tuple[Any, Any]] | None = None,
        depth: int = 8,
        max_mb: float = 768.0,
    ) -> Iterator[tuple[Batch, Labels]]:
        """The batches with their labels, in order, the labels of later ones under way meanwhile.

        Args:
            batches: read `depth` ahead at most, such as a DataLoader.
            masks: from a batch to its input_ids and loss_mask; None takes the items `input_ids`, and `loss_mask` or `labels != -100`.
            depth: batches that are asked about or wait to be taken, at most; at least 1.
            max_mb: MiB of host memory that these labels may take; one batch is asked about however large it is.

        Raises:
            ConfigError: `depth` or `max_mb` out of range; at once.
            Exception: whatever `labels` raises for the next batch.
        """
        if depth < 1 or not max_mb > 0:
            raise ConfigError(f"ahead: depth must be at least 1 and max_mb above 0, not {depth} and {max_mb:g}")
        return self._ahead(batches, masks or _masks_of, depth, round(max_mb * 2**20))

    def _ahead(
        self, batches: Iterable[Batch], masks: Callable[[Batch], tuple[Any, Any]], depth: int, max_bytes: int
    ) -> Iterator[tuple[Batch, Labels]]:
        waiting: deque[tuple[Batch, int, Future[Labels]]] = deque()
        coming = iter(batches)
        following: tuple[Batch, AskedBatch, int] | None = (
            None  # read, and too large to be asked about beside the others
        )
        held, ended = 0, False
        try:
            while True:
                while len(waiting) < depth and not ended:
                    if following is None:
                        for batch in coming:
                            asked = AskedBatch.of(*masks(batch))
                            following = batch, asked, self._source.peak_bytes(asked.request)
                            break
                        else:
                            ended = True
                            break
                    if waiting and held + following[2] > max_bytes:
                        break
                    batch, asked, size = following
                    waiting.append((batch, size, event_loop.start(self._ask(asked))))
                    held, following = held + size, None
                if not waiting:
                    return
                batch, size, future = waiting[0]
                labels = future.result()
                waiting.popleft()
                held -= size
                yield batch, labels
        finally:
            for _, _, future in waiting:
                future.cancel()

    async def _ask(self, asked: AskedBatch) -> Labels:
        if self._closed:
            raise RunError(f"the connection to teacher {self.info.name!r} is closed: connect again")
        found = await self._source.labels(asked.request)
        signals = with_checked_rows(found.signals, asked.request.batch)
        request = asked.request
        return Labels(
            asked.shape,
            torch.from_numpy(asked.index_N),
            torch.from_numpy(asked.label_ids_N),
            self.vocab_rows,
            self.transport,
            found.usage,
            LabelTensors.of(signals),
            self._head_on,
            self._tally,
            lambda: self._service.forget(self.info),
            lambda row: request.names[request.batch.sequence_of_row(row)],
        )

    def _head_on(self, device: torch.device) -> Head | None:
        if self._head is None:
            return None
        if device not in self._heads:
            self._heads[device] = head_on(self._head, self.vocab_rows, device)
        return self._heads[device]


def _masks_of(batch: Any) -> tuple[Any, Any]:
    """Token ids and loss mask of a batch as collators make it.

    Raises:
        DataError: it has other items.
    """
    try:
        ids, mask = batch["input_ids"], batch["loss_mask"] if "loss_mask" in batch else batch["labels"] != -100
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            "ahead: a batch needs the items input_ids, and loss_mask or labels (-100 where nothing is learned); "
            "or pass masks=... which finds both",
            value=sorted(batch) if isinstance(batch, dict) else type(batch).__name__,
        ) from error
    return ids, mask
