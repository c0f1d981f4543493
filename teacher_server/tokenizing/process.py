"""A tokenizer in a process of its own, for the teacher that reads with it: started at the first row, again after a row that ended it.

In: rows; out: their ids, or why they cannot be had. Calls block, and come from one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

from teacher_server.tokenizing import frames
from teacher_server.tokenizing.files import TokenizerFiles
from teacher_server.tokenizing.worker import NOT_NOW
from teacher_wire.core.errors import UnavailableError
from teacher_wire.tokenizing import codec
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow

log = logging.getLogger(__name__)

ROW_S = 10.0  # CPU time that one row may take
TURN_S = 1.0  # CPU time of a call, after which it begins no other row: others wait for their turn
_MEMORY_BYTES = 2 << 30  # beyond the tokenizer itself
_START_S = 300.0  # on a machine that is busy loading a model
_PATIENCE = 30.0  # so many times `row_s` may pass by the clock: the process has other company


class TokenizerProcess:
    """See module.

    Args:
        files: of the teacher.
        row_s: CPU time of one row, after which it is refused.
        turn_s: CPU time of one call, after which it leaves the rest to the next.
        memory_bytes: that rows may take beyond the tokenizer itself.

    Attributes:
        starts: processes started so far.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        *,
        row_s: float = ROW_S,
        memory_bytes: int = _MEMORY_BYTES,
        turn_s: float = TURN_S,
    ) -> None:
        self._files = files
        self._row_s = row_s
        self._turn_s = turn_s
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.starts = 0

    def rows(self, rows: Sequence[TextRow]) -> list[TokenizedRow]:
        """Answers of the first rows, in order: of one at least, of all if they take no longer than a turn.

        A row that takes too long is refused at once; one on which the process ends otherwise, if a second one ends on it too. Either ends
        the turn.

        Raises:
            UnavailableError: the process does not start, or the teacher is going away.
        """
        answers: list[TokenizedRow] = []
        suspect = -1
        while len(answers) < len(rows):
            code = self._some(rows, answers)
            if code is None:
                return answers
            if code == -signal.SIGPROF:
                answers.append(TokenizedRow.refusal(f"it takes more than {self._row_s:g} s to render and tokenise"))
                return answers
            if suspect == len(answers):
                answers.append(TokenizedRow.refusal(f"the tokenizer ended on it twice (code {code})"))
                return answers
            suspect = len(answers)
        return answers

    def _some(self, rows: Sequence[TextRow], answers: list[TokenizedRow]) -> int | None:
        """Adds answers of the rows that have none, as many as come in a turn; the process's exit code if it ended on the next one."""
        process = self._started()
        try:
            frames.write(_pipe(process.stdin), codec.texts_to_bytes(rows[len(answers) :]))
            while len(answers) < len(rows):
                data = self._read(process, _PATIENCE * self._row_s)
                if data == NOT_NOW:
                    break
                answers.append(codec.row_of_bytes(data))
        except (EOFError, OSError):
            code = self._end()
            if self._closed:
                raise UnavailableError("the teacher is going away") from None
            log.warning("the tokenizer ended (code %s) on a row of %d bytes", code, rows[len(answers)].size)
            return code
        return None

    def close(self) -> None:
        """Ends the process, from any thread; a call under way fails as unavailable."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise UnavailableError("the teacher is going away")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        paths = os.pathsep.join(path for path in sys.path if path)
        bounds = [str(self._row_s), str(self._memory_bytes), str(self._turn_s)]
        command = [sys.executable, "-m", "teacher_server.tokenizing.worker", *bounds]
        threads = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": paths},
        )
        self._process = process
        self.starts += 1
        try:
            frames.write(_pipe(process.stdin), self._files.to_bytes())
            self._read(process, _START_S)
        except (EOFError, OSError):
            code = self._end()
            raise UnavailableError(f"the tokenizer's process does not start (code {code})") from None
        return process

    def _read(self, process: subprocess.Popen[bytes], within_s: float) -> bytes:
        """The next answer.

        Raises:
            EOFError: the process has ended, or is silent for too long and was ended.
        """
        stream = _pipe(process.stdout)
        deadline = time.monotonic() + within_s
        arrived = select.poll()  # not `select.select`, which knows no file descriptor above 1,023
        arrived.register(stream, select.POLLIN)  # an end of file comes as POLLHUP, which is always told
        while not arrived.poll(1000):
            if time.monotonic() > deadline:
                process.kill()
                raise EOFError
        return frames.read(stream)

    def _end(self) -> int | None:
        """Ends the process if it still runs; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _pipe(stream).close()
        return code


def _pipe(stream: Any) -> BinaryIO:
    assert stream is not None
    return cast(BinaryIO, stream)
