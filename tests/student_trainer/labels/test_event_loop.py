"""The student's loop starts from any thread, in whatever state the caller's own loop is."""

import subprocess
import sys


def test_a_program_that_has_run_a_loop_of_its_own_can_still_ask():
    code = (
        "import asyncio\n"
        "from student_trainer.labels import event_loop as background\n"
        "async def nothing(): return 1\n"
        "asyncio.run(nothing())\n"
        "print(background.run(nothing()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "1", done.stderr
