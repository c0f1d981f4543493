"""Commands that are forked are commands: output, exit codes, signals, folder and variables of their own."""

import os
import signal
import subprocess
import time

from tests.cases.material import base_file
from tests.students import run_student, start_student


def test_what_it_wrote_and_how_it_ended(tmp_path):
    refused = run_student("train", "absent.yaml", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "student-trainer: absent.yaml: No such file or directory\n"
    shown = run_student("--help", env={"COLUMNS": "60"})
    assert shown.returncode == 0 and "Train a student" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 60


def test_killed_and_interrupted(tmp_path):
    config = base_file(tmp_path)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        folder = tmp_path / str(number)
        process = start_student("train", config, "train.max_steps=100000", f"run.output_dir={folder}", stderr=subprocess.PIPE)  # fmt: skip
        assert process.pid != os.getpid() and process.poll() is None
        while process.poll() is None and not (folder / "train_log.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == process.poll() == code, said
    assert "interrupted; go on with: student-trainer train" in said


def test_two_at_once_write_the_same(tmp_path):
    """Each by the random numbers of its seed, whoever was forked before."""
    config = base_file(tmp_path)
    folders = [tmp_path / name for name in ("one", "other")]
    running = [start_student("train", config, f"run.output_dir={folder}", stderr=subprocess.PIPE) for folder in folders]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    one, other = ((folder / "final" / "model.safetensors").read_bytes() for folder in folders)
    assert one == other
