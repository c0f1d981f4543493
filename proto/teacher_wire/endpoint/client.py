"""The student's half of the contract: describe, labels, samples, artifacts and status of one server.

In: an address and what is asked; out: answers that were checked. What is retryable is retried for a stated time (`score/client.py`,
`transport/retry.py`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc

from teacher_wire import PROTOCOL
from teacher_wire.artifacts import client as artifacts
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import Cache, Latency
from teacher_wire.core.errors import NotFoundError, TeacherWireError
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.status import ServerStatus
from teacher_wire.endpoint import status_codec
from teacher_wire.generate import client
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec
from teacher_wire.publish import client as publishing
from teacher_wire.publish.messages import Publication
from teacher_wire.score import codec
from teacher_wire.score.client import ScoreClient
from teacher_wire.tokenizing import client as tokenizing
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow
from teacher_wire.transport import status_table, versions
from teacher_wire.transport.channel import Credentials
from teacher_wire.transport.connection import BACKOFF_S, ClientStats, Connection
from teacher_wire.transport.retry import Retry
from teacher_wire.v2 import teacher_pb2 as pb

log = logging.getLogger(__name__)

DEFAULT_WINDOW_BYTES = 64 << 20


class TeacherClient:
    """An async client of one server; use it as an async context manager, in one event loop.

    Args:
        address: HOST:PORT, or several with commas: when one edge is gone the next is tried.
        credentials: TLS files, token, tenant.
        window_bytes: reply bytes the server may have under way to us.
        retry_for_s: how long a request is retried while the server is unreachable or overloaded.
        backoff_s: shortest and longest pause before the next try.
        on_trouble: told about every retry, for progress displays.
        answer_s: how long a call that the server has taken may stay without any part of its answer before it is made again; it is
            told to the server as the deadline of calls that have none. Infinite for ever.

    Raises:
        RequestError: from the constructor, if the address is none or a file cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        retry_for_s: float = 300.0,
        backoff_s: tuple[float, float] = BACKOFF_S,
        on_trouble: Callable[[TeacherWireError], None] | None = None,
        answer_s: float = math.inf,
    ) -> None:
        self.address = address
        self._answer_s = answer_s
        self._retry_for_s = retry_for_s
        self._on_trouble = on_trouble or (lambda error: log.warning("%s; trying again", error))
        self._connection = Connection(address, credentials, backoff_s)
        self._requests = ScoreClient(
            self._connection,
            window_bytes=window_bytes,
            retry_for_s=retry_for_s,
            on_trouble=self._on_trouble,
            answer_s=answer_s,
        )

    async def __aenter__(self) -> TeacherClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the stream; unanswered requests fail with CancelledRequestError."""
        await self._requests.close()
        await self._connection.close()

    @property
    def stats(self) -> ClientStats:
        """Counters since the client was made."""
        return self._connection.stats

    @property
    def open_requests(self) -> int:
        """Score requests that are not answered yet."""
        return self._requests.open_requests

    # ------------------------------------------------------------ unary calls

    async def describe(self, timeout_s: float = 10.0, wait_for_s: float = 0.0) -> list[TeacherInfo]:
        """Every teacher behind the address.

        Args:
            timeout_s: of one try.
            wait_for_s: how long to keep trying while nobody answers.

        Raises:
            UnavailableError: nobody answers.
            CapabilityError: another version of the contract, or no teacher server at all.
        """
        give_up_at = time.monotonic() + wait_for_s
        tried = 0
        while True:
            try:
                reply = await self._connection.stub.Describe(
                    pb.DescribeRequest(), timeout=timeout_s, metadata=self._connection.metadata, wait_for_ready=False
                )
                return codec.decode_description(reply)
            except grpc.RpcError as error:
                problem = self._connection.problem(error)
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    theirs = await versions.of_older_server(
                        self._connection.channel, self._connection.metadata, timeout_s
                    )
                    problem = (
                        versions.difference(PROTOCOL, theirs, self.address) if theirs else versions.no_teacher(problem)
                    )
                if not isinstance(problem, status_table.RETRYABLE):
                    raise problem from None
                await self._connection.next_edge()
                tried += 1
                if tried < self._connection.edges:
                    continue
                if time.monotonic() >= give_up_at:
                    raise problem from None
                await asyncio.sleep(self._connection.pause_s(problem))

    async def teacher(self, name: str = "", wait_for_s: float = 0.0) -> TeacherInfo:
        """The teacher of that name; the empty name means the only one.

        Raises:
            NotFoundError: no such teacher, or several and no name.
        """
        teachers = {info.name: info for info in await self.describe(wait_for_s=wait_for_s)}
        if not name and len(teachers) == 1:
            return next(iter(teachers.values()))
        if name not in teachers:
            raise NotFoundError(
                f"no teacher of that name at {self.address}",
                field="teacher.name", value=name or "(none given)", limit="|".join(sorted(teachers)),
            )  # fmt: skip
        return teachers[name]

    async def server_status(self, timeout_s: float = 10.0) -> ServerStatus:
        """How the server is doing; of tenants, only the caller's own unless it is an operator.

        Raises:
            CapabilityError: it keeps no status.
            UnavailableError: nobody answers.
        """
        try:
            reply = await self._connection.stub.Status(
                pb.StatusRequest(), timeout=timeout_s, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            raise self._connection.problem(error) from None
        return status_codec.decode_status(reply)

    async def artifact(
        self,
        info: TeacherInfo,
        wanted: ArtifactInfo,
        progress: Callable[[int, int], None] | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> Artifact:
        """An artifact of a teacher, its digest checked. A call that breaks is taken up where it was.

        Args:
            info: whose.
            wanted: one of `info.artifacts`.
            progress: called with bytes received and bytes in all.
            timeout_s: of one call; 0 for none.

        Raises:
            LabelError: what came is not what was described.
            CapabilityError: this teacher, or this side, has no artifacts of that kind.
            UnavailableError, OverloadedError: nothing came for `retry_for_s`.
        """
        retry = replace(self._retry(), next_edge=self._connection.next_edge)
        return await artifacts.fetch(
            lambda: self._connection.stub, self._connection.metadata, info, wanted, retry, progress, timeout_s
        )

    async def tokenize(
        self,
        info: TeacherInfo,
        rows: Sequence[TextRow],
        progress: Callable[[int, int], None] | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> list[TokenizedRow]:
        """Texts in the teacher's own tokens, in the order of `rows`; in as many calls as its limits make of them.

        Args:
            info: the teacher, as `describe` gave it; its fingerprint is part of the request.
            rows: texts, each alone or as the answer in a conversation. One that cannot be had comes back with `refused`.
            progress: called with the rows that are done and all rows.
            timeout_s: of one call; 0 for none.

        Raises:
            CapabilityError: this teacher does not tokenise.
            LabelError: an answer that is not what was asked for.
            MismatchError: the teacher behind the address is another one now.
            UnavailableError, OverloadedError: nothing came for `retry_for_s`.
        """
        retry = replace(self._retry(), next_edge=self._connection.next_edge)
        return await tokenizing.tokenize(
            lambda: self._connection.stub, self._connection.metadata, info, rows, retry, progress, timeout_s
        )

    async def publish(
        self, publication: Publication, sources: Sequence[Path], progress: Callable[[str, int, int], None] | None = None
    ) -> str:
        """Publishes a revision of a teacher; returns its fingerprint when a replica answers with it. A call that breaks is taken up.

        With `publication.check_only` nothing is sent, and nothing returned: the server would take it.

        Args:
            publication: what, and of which teacher.
            sources: where its files are, in their order.
            progress: called with what is being done, bytes sent and bytes in all.

        Raises:
            ForbiddenError, CapabilityError: we may not, or nobody may.
            LimitError, RequestError, MismatchError: the server does not take these files.
            ServerError: no replica can load them; the revision before stays.
            UnavailableError, OverloadedError, DeadlineError: not live within `retry_for_s`, or `publication.timeout_s`.
        """
        retry = replace(self._retry(), next_edge=self._connection.next_edge)
        return await publishing.publish(
            lambda: self._connection.stub, self._connection.metadata, publication, sources, retry, progress
        )

    def _retry(self) -> Retry:
        connection = self._connection
        return Retry(
            self.address, self._retry_for_s, connection.pause_s, self._on_trouble, connection.stats, connection.route,
            self._answer_s,
        )  # fmt: skip

    # ----------------------------------------------------------------- labels

    async def score(
        self,
        info: TeacherInfo,
        spec: SignalSpec,
        batch: TokenBatch,
        *,
        timeout_s: float = 0.0,
        cache: Cache = "shared",
        latency: Latency = "bulk",
    ) -> TeacherSignals:
        """The teacher's labels for the wanted rows of `batch`.

        Args:
            info: the teacher, as `describe` gave it; its fingerprint is part of the request.
            spec: which signal.
            batch: which tokens and rows.
            timeout_s: after which the request has failed and the server may drop it; 0 for `answer_s`, after which it is asked again.
            cache: "none" for labels that nobody will ask for again, such as those of a rollout: the server neither looks for them nor keeps
                them.
            latency: "interactive" if somebody waits for this very answer: it goes before bulk requests, within the tenant's share.

        Raises:
            RequestError, LimitError: `batch` breaks a limit; checked before anything is sent.
            LabelError: an answer that must not be learned from.
            MismatchError: the teacher behind the address is another one now.
            UnavailableError: nobody answered for `retry_for_s`.
        """
        return await self._requests.score(info, spec, batch, timeout_s=timeout_s, cache=cache, latency=latency)

    def generate(
        self, info: TeacherInfo, spec: SamplingSpec, prompts: PromptBatch, *, timeout_s: float = 0.0
    ) -> AsyncGenerator[Sample, None]:
        """Samples of every prompt in the order in which they finish, none twice; close it (`aclose`) to stop the work.

        Args:
            info: the teacher, as `describe` gave it.
            spec: how to sample.
            prompts: what to go on from.
            timeout_s: of one call; 0 for none.

        Raises:
            RequestError, LimitError, CapabilityError: what this teacher cannot do; checked before anything is sent.
            LabelError: a sample that was not asked for, or is not what was asked for.
            MismatchError: the teacher behind the address is another one now.
            UnavailableError, OverloadedError: nothing came for `retry_for_s`.
        """
        call = GenerateCall(info.name, info.fingerprint, spec, prompts, timeout_s=timeout_s)
        return client.samples(self._connection.stub, self._connection.metadata, call, info, self._retry())
