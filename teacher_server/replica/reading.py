"""Tokenize at a replica: the tokenizer in its own process, fair by tenant, and its byte table as one more artifact.

In: a TokenizeCall; out: its rows. It takes no time of the model's threads: rows are rendered and tokenised in another process, one piece of
one tenant after a piece of the next.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from teacher_server.backends.base import Backend, ReadingBackend
from teacher_server.tokenizing.files import TokenizerFiles
from teacher_server.tokenizing.process import TokenizerProcess
from teacher_server.tokenizing.rows import table_of
from teacher_wire.artifacts.kinds.byte_table import to_artifact
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.errors import CapabilityError, MismatchError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall, TokenizedRow, check_tokenize
from teacher_wire.transport.offload import SMALL_BYTES, Offload

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20  # of one request
MAX_ROWS = 2048  # many, for whoever asks for every token of a vocabulary
_PIECE_BYTES, _PIECE_ROWS = 64 << 10, 256  # of a tenant's rows, before the next tenant's


class Reader:
    """Answers Tokenize for one teacher.

    Args:
        backend: of the teacher.
        info: as the teacher would be described without Tokenize.

    Attributes:
        info: as it is described with it.
        artifacts: what it gives away beside those of the backend.
    """

    def __init__(self, backend: Backend, info: TeacherInfo) -> None:
        self.info = info
        self.artifacts: tuple[Artifact, ...] = ()
        self._process: TokenizerProcess | None = None
        self._offload = Offload(threads=1)
        self._counts: Counter[str] = Counter()
        files = _files(backend, info)
        if files is None:
            return
        try:
            self.artifacts = (to_artifact(table_of(files)),)
        except CapabilityError as error:
            log.info("teacher %s offers no Tokenize: %s", info.name, error)
            return
        self._process = TokenizerProcess(files)
        limits = replace(info.limits, max_tokenize_bytes=MAX_BYTES, max_tokenize_rows=MAX_ROWS)
        given = (*info.artifacts, *(artifact.info for artifact in self.artifacts))
        self.info = replace(info, limits=limits, artifacts=given)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        """One answer for each row, in order.

        Raises:
            CapabilityError: this teacher does not tokenise.
            MismatchError: this replica holds other weights (`field` is "fingerprint").
            RequestError, LimitError: the call breaks a rule or a limit.
            UnavailableError: the tokenizer's process does not start, or the replica is going away.
        """
        if call.fingerprint and call.fingerprint != self.info.fingerprint:
            raise MismatchError(
                "the teacher here is another one",
                field="fingerprint",
                value=self.info.fingerprint,
                limit=call.fingerprint,
            )
        check_tokenize(call, self.info)
        assert self._process is not None, "checked with the limits"
        answers: list[TokenizedRow] = []
        for piece in _pieces(call.rows):
            left = piece
            while left:  # always in the thread: the process takes its time, and a turn may be too short for all of them
                some = await self._offload.run(call.tenant, SMALL_BYTES + 1, self._process.rows, left)
                answers, left = answers + some, left[len(some) :]
        self._counts.update(
            tokenized_rows=len(answers),
            tokenized_bytes=call.size,
            tokenize_refused=sum(bool(a.refused) for a in answers),
        )
        return answers

    def counters(self) -> dict[str, int]:
        """Rows and bytes so far, and rows that were refused."""
        return {name: self._counts[name] for name in ("tokenized_rows", "tokenized_bytes", "tokenize_refused")}

    def close(self) -> None:
        """Ends the process; calls under way fail as unavailable."""
        if self._process is not None:
            self._process.close()
        self._offload.close()


def _files(backend: Backend, info: TeacherInfo) -> TokenizerFiles | None:
    """The tokenizer of a backend that has one."""
    if not isinstance(backend, ReadingBackend):
        return None
    from teacher_server.backends.tokenizer import (
        tokenizer_files,  # transformers, which a backend with a tokenizer has loaded
    )

    files = tokenizer_files(backend.tokenizer, info.vocab_rows)
    if files is None:
        log.warning("teacher %s offers no Tokenize: its chat template does not come to an end", info.name)
    return files


def _pieces(rows: Sequence[TextRow]) -> Iterator[list[TextRow]]:
    """The rows in pieces of about `_PIECE_BYTES`, and of `_PIECE_ROWS` at most."""
    piece: list[TextRow] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += row.size
        if size >= _PIECE_BYTES or len(piece) == _PIECE_ROWS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
