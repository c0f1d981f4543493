"""The tokenizer's process: `TokenizerFiles` first, then rows, and an answer for each as soon as it is there.

It loads neither torch nor ray. A row that takes more CPU time than it may ends the process by a signal that no code inside can hold up,
also where a template or a regular expression loops in C; whoever started it names the row and starts another. Of rows that came together
those that it did not come to in its turn are left to be sent again: an empty message says so.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from typing import BinaryIO

from teacher_server.tokenizing import frames
from teacher_server.tokenizing.files import TokenizerFiles
from teacher_server.tokenizing.rows import RowReader
from teacher_wire.tokenizing import codec
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow

NOT_NOW = b""  # in place of the answers that are left


def main(row_s: float, memory_bytes: int, turn_s: float) -> None:
    """Answers until the other side closes its end.

    Args:
        row_s: CPU time of one row.
        memory_bytes: that rows may take beyond the tokenizer itself.
        turn_s: CPU time of rows that came together, after which no other of them is begun.
    """
    requests, answers = _pipes()
    reader = RowReader(TokenizerFiles.of_bytes(frames.read(requests)))
    _bound_memory(memory_bytes)
    frames.write(answers, b"ready")
    while True:
        try:
            rows = codec.texts_of_bytes(frames.read(requests))
        except EOFError:
            return
        began_s = time.process_time()
        for number, row in enumerate(rows):
            if number and time.process_time() - began_s >= turn_s:
                frames.write(answers, NOT_NOW)
                break
            frames.write(answers, codec.row_to_bytes(_answer(reader, row, row_s)))


def _answer(reader: RowReader, row: TextRow, row_s: float) -> TokenizedRow:
    signal.setitimer(signal.ITIMER_PROF, row_s)
    try:
        return reader.row(row)
    except MemoryError:
        return TokenizedRow.refusal("it takes more memory than a row may")
    except Exception as error:  # a row that nobody has thought of must not cost a process
        traceback.print_exc()
        return TokenizedRow.refusal(f"it cannot be rendered and tokenised ({type(error).__name__})")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """Requests and answers; what a library prints goes to stderr and not among the answers."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdin.close()
    return requests, answers


def _bound_memory(more_bytes: int) -> None:
    """Holds the process to what it has now and so much more, where the system says what it has."""
    try:
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
