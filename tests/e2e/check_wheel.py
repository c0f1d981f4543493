"""By hand (`make wheel`): the built wheel and sdist, each in an empty virtual environment outside of the checkout. The wheel serves a tiny teacher, trains a
student against it, answers a prompt and copies its examples; the sdist builds the same wheel. Takes minutes and 3 GB of disk for a while.

    python -m tests.e2e.check_wheel [ENVIRONMENT]     # an environment in which the wheel is installed already
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
PORT = 50079


def installed(folder: Path) -> Path:
    """An environment with the wheel and both extras; its bin folder."""
    wheel = max(DIST.glob("lyceum_distill-*.whl"), key=lambda path: path.stat().st_mtime)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = ROOT / "deploy" / "constraints.txt"
    torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    for arguments in (
        ["--upgrade", "pip>=25"],
        [torch],
        ["--constraint", str(constraints), f"{wheel}[student,teacher]"],
    ):
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments], check=True)
    return folder / "bin"


def main() -> None:
    """Runs the check and prints what it saw."""
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        folder = Path(name)
        place = Path(sys.argv[1]).absolute() / "bin" if len(sys.argv) > 1 else installed(folder / "environment")
        os.chdir(folder)  # not in the checkout: what is imported is what was installed
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "HOME": name,
            "HF_HUB_OFFLINE": "1",
        }

        def run(*command: object) -> str:
            done = subprocess.run(
                list(map(str, command)), env=env, capture_output=True, text=True, timeout=400, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
            return done.stdout

        where = run(
            place / "python",
            "-c",
            "import student_trainer, teacher_server; print(student_trainer.__file__, teacher_server.__file__)",
        )
        assert str(ROOT) not in where, where
        print(
            run(place / "student-trainer", "--version").strip(),
            "and",
            run(place / "teacher-server", "--version").strip(),
        )
        examples = Path(run(place / "student-trainer", "config", "examples", folder / "given").strip())
        assert (examples / "student-3090.yaml").is_file()
        assert "usage" in run(place / "python", "-m", "lyceum_distill.demo", "--help").lower()
        make = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from tests.tiny import make_model; "
        for model, seed in (("big", 1), ("small", 2)):
            run(place / "python", "-c", make + f"make_model(Path({str(folder / model)!r}), seed={seed})")
        rows = "".join(
            json.dumps({"instruction": "Go on.", "input": str(i), "output": f"the cat {i}"}) + "\n" for i in range(20)
        )
        (folder / "rows.jsonl").write_text(rows)
        backend = {"kind": "transformers", "model": str(folder / "big"), "dtype": "float32", "device": "cpu"}
        server = {
            "edge": {"port": PORT},
            "ray": {"num_cpus": 2, "object_store_mb": 100},
            "teachers": [{"name": "t", "num_cpus": 0.2, "backend": backend}],
        }
        (folder / "server.yaml").write_text(yaml.safe_dump(server))
        student = yaml.safe_load((examples / "student-cpu.yaml").read_text())  # a file of the wheel, with our paths
        student |= {"run": {"output_dir": "run"}, "model": {"path": "small", "dtype": "float32", "lora": {"rank": 4}},
                    "data": {"train": ["rows.jsonl"], "eval": ["rows.jsonl#4"]}, "teacher": {"address": f"127.0.0.1:{PORT}", "wait_s": 180}}  # fmt: skip
        student["train"] |= {"max_steps": 3, "warmup_steps": 1, "log_steps": 1, "eval_steps": 3, "report_to": []}
        (folder / "run.yaml").write_text(yaml.safe_dump(student))
        log = folder / "server.log"
        with log.open("w") as told:
            served = subprocess.Popen([str(place / "teacher-server"), "up", "server.yaml"], env=env, stderr=told)
        try:
            deadline = time.monotonic() + 300
            while "ready on" not in log.read_text():
                assert served.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            run(place / "student-trainer", "train", "run.yaml")
        finally:
            served.send_signal(signal.SIGINT)
            served.wait(timeout=90)
        assert (folder / "run" / "final" / "adapter_model.safetensors").is_file()
        (folder / "ask.txt").write_text("the cat\n")
        run(
            place / "student-trainer",
            "infer",
            "run",
            "--prompts",
            "ask.txt",
            "--out",
            "said.jsonl",
            "--max-new-tokens",
            "4",
        )
        print(
            "served, trained and asked by what was installed:",
            sorted(path.name for path in (folder / "run" / "final").iterdir()),
        )


if __name__ == "__main__":
    main()
