"""Code blocks marked `<!-- ci: ... -->` are run, page by page and in their order, on tiny models put in the place of the named ones.

`teacher-server up` is started once, for the first page that asks for it; other servers' configs are checked. `student-trainer` runs in forks
(tests/students.py). What is not the page's own is put under it: model folders, rows, a free port, few steps, a CPU.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, marked_blocks
from tests.e2e.conftest import free_port
from tests.students import run_student

EXAMPLES = ROOT / "deploy" / "examples"
SMALLER = {
    "device: cuda": "device: cpu", "num_gpus: 1": "num_gpus: 0", "num_cpus: 2\n": "num_cpus: 0.5\n", "object_store_mb: 4096": "object_store_mb: 100",
    "epochs: 3": "max_steps: 2", "accumulation: 8": "accumulation: 1", "warmup_steps: 50": "warmup_steps: 1", "log_steps: 10": "log_steps: 1",
    "save_steps: 200": "save_steps: 2", "report_to: [tensorboard]": "report_to: []", "max_tokens: 192": "max_tokens: 120", "#256": "#6",
    "dtype: bfloat16": "dtype: float32", "bf16: true": "bf16: false", "min_lr_share: 0.05": "report_to: []",
}  # fmt: skip


class Playground:
    """A folder that looks to a page's commands as a user's does, and the one server that runs in it."""

    def __init__(self, folder: Path, models: dict[str, Path], rows: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._server: subprocess.Popen[str] | None = None
        (folder / "home").mkdir()
        examples = folder / "deploy" / "examples"
        examples.mkdir(parents=True)
        for path in EXAMPLES.glob("*.yaml"):
            text = path.read_text().replace("50051", str(self.port))
            for name, model in models.items():
                text = text.replace(name, str(model))
            for large, small in SMALLER.items():
                text = text.replace(large, small)
            (examples / path.name).write_text(text)
        for place in ("data/train.jsonl", ".cache/demo/data/train.jsonl", ".cache/demo/data/heldout.jsonl"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(rows, folder / place)
        (folder / "data" / "questions.txt").write_text("the cat\nan old dog\n")
        self.env = {"HOME": str(folder / "home"), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}

    def run(self, page: Path, mark: str) -> list[str]:
        """Every command of a page's marked blocks; returns what each printed."""
        blocks = marked_blocks(page, mark)
        assert blocks, f"{page} has no block marked {mark}"
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        return [
            self._one(line.replace("50051", str(self.port)))
            for line in lines
            if line.strip() and not line.lstrip().startswith("#")
        ]

    def _one(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        if words[:2] == ["teacher-server", "up"]:
            return self._up(words[2:])
        if words[0] == "student-trainer":
            done = run_student(*words[1:], cwd=self.folder, env=self.env, timeout=200)
        elif words[0] == "teacher-server":
            command = [sys.executable, "-m", "teacher_server.cli", *words[1:]]
            done = subprocess.run(
                command,
                cwd=self.folder,
                env={**os.environ, **self.env},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        else:
            raise AssertionError(f"nobody knows how to run {line!r}")
        assert done.returncode == 0, f"$ {line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def _up(self, arguments: list[str]) -> str:
        command = [sys.executable, "-m", "teacher_server.cli"]
        env = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        if self._server is not None:
            done = subprocess.run(
                [*command, "config", "show", *arguments],
                cwd=self.folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout
        log = self.folder / "server.log"
        self._server = subprocess.Popen([*command, "up", *arguments], cwd=self.folder, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, text=True)  # fmt: skip
        deadline = time.monotonic() + 240
        while "ready" not in log.read_text():
            assert self._server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        return log.read_text()

    def end(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(timeout=90)


@pytest.fixture(scope="module")
def playground(tmp_path_factory, model_factory, rows_file):
    models = {
        "Qwen/Qwen2.5-7B-Instruct": model_factory("qwen2", seed=5),
        "Qwen/Qwen2.5-1.5B-Instruct": model_factory("qwen2"),
        ".cache/demo/teacher": model_factory("qwen2", seed=5),
        "runs/demo/students/seed0": model_factory("qwen2"),
    }
    ground = Playground(tmp_path_factory.mktemp("page"), models, rows_file)
    yield ground
    ground.end()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_readmes_commands_run_in_their_order(playground):
    said = playground.run(ROOT / "README.md", "readme")
    assert "ready on" in said[0] and "vllm serve" in said[-1]
    answers = [json.loads(line) for line in (playground.folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and (playground.folder / "exported" / "mine" / "model.safetensors").is_file()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_quickstarts_commands_run_in_their_order(playground):
    said = playground.run(DOCS / "start" / "quickstart.md", "demo")
    assert (playground.folder / "runs" / "mine" / "final").is_dir() and len(said) >= 5


def test_your_own_data_says_what_the_readme_says():
    """Its commands are README's but for one folder's name, so they need not be run twice."""

    def of(page: Path, mark: str) -> list[str]:
        return re.sub(r"exported/[\w.-]+", "exported", "\n".join(marked_blocks(page, mark))).split()

    assert of(DOCS / "start" / "own_data.md", "own") == of(ROOT / "README.md", "readme")


def test_certificates_and_tokens_are_what_the_server_takes(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    for page in (DOCS / "recipes" / "two_boxes.md", DOCS / "operate" / "security.md"):
        for block in marked_blocks(page, "certificates"):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
    check = ["openssl", "verify", "-CAfile", "ca.pem", "server.pem", "group-a.pem"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0

    from teacher_server.edge.auth import TokenFile

    tokens = TokenFile(tmp_path / "tokens")
    names = [line.split() for line in (tmp_path / "tokens").read_text().splitlines()]
    assert [tokens.tenant(token) for _, token in names] == ["group-a", "operators"]
