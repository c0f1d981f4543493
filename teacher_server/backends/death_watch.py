"""Ends processes when the one that asked for it is gone, even by SIGKILL: vLLM's engines notice no such death by themselves.

In: pids; a pipe whose end says that the parent has ended. It is also a script, which imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence

import psutil


def start(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """A process that waits for this one to end, or for its pipe to be closed, then kills `pids` and what they started."""
    named = [f"{pid}:{psutil.Process(pid).create_time()}" for pid in pids]
    return subprocess.Popen([sys.executable, __file__, *named], stdin=subprocess.PIPE, start_new_session=True)


def main() -> None:
    """Waits, then kills; a pid that has gone to another process since is left alone."""
    sys.stdin.buffer.read()
    for named in sys.argv[1:]:
        pid, created = named.split(":")
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(int(pid))
            if root.create_time() == float(created):
                for process in (*root.children(recursive=True), root):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


if __name__ == "__main__":
    main()
