"""A fake teacher in a process of its own, for tests that kill it: `python -m tests.student_trainer.fake_process PORT JSON`.

The JSON holds the fields of `FakeTeacher`. It prints its port when it is open, and ends with its standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys

from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import LoopbackServer

FIELDS = ("vocab_rows", "hidden_size", "seed", "delay_s", "tokenizer_sha256", "chat_template_sha256", "base_tokenizer_sha256", "added_tokens")  # fmt: skip


def start_fake(fake: FakeTeacher, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """A process that answers as `fake` does, and its port."""
    told = json.dumps({name: getattr(fake, name) for name in FIELDS})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.student_trainer.fake_process", str(port), told],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


if __name__ == "__main__":
    print(LoopbackServer(FakeTeacher(**json.loads(sys.argv[2])), port=int(sys.argv[1])).start().port, flush=True)
    sys.stdin.read()
