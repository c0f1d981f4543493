"""Must show 6, by hand (`make extras`): each house alone. Two fresh environments, one with each extra; the teacher's serves,
the student's trains against it, and neither has the other's packages. Takes a few minutes and 3 GB of disk for a while.
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
ABSENT = {"teacher": ["peft", "datasets", "matplotlib"], "student": ["ray"]}


def environment(folder: Path, extra: str) -> Path:
    """A virtual environment with only `extra`; its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    constraints = ROOT / "deploy" / "constraints.txt"
    torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    for arguments in (["--upgrade", "pip>=25"], [torch], ["--constraint", str(constraints), f"{ROOT}[{extra}]"]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True)
    for package in ABSENT[extra]:
        found = subprocess.run([str(python), "-c", f"import {package}"], capture_output=True, check=False)
        assert found.returncode != 0, f"{package} came with the {extra} extra"
    return folder / "bin"


def main() -> None:
    """Runs the check and prints what it saw."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cwd").mkdir()
        os.chdir(folder / "cwd")  # not in the repository: what is imported is what was installed
        print("installing the teacher extra alone", flush=True)
        teacher = environment(folder / "teacher", "teacher")
        print("installing the student extra alone", flush=True)
        student = environment(folder / "student", "student")
        make = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.tiny import make_model; from pathlib import Path; "
        for model, seed in (("big", 1), ("small", 2)):
            code = make + f"make_model(Path({str(folder / model)!r}), seed={seed})"
            subprocess.run([str(student / "python"), "-c", code], check=True)
        rows = folder / "rows.jsonl"
        rows.write_text(
            "".join(
                json.dumps({"instruction": "Go on.", "input": str(i), "output": f"cat {i}"}) + "\n" for i in range(20)
            )
        )
        server_file, train_file = folder / "server.yaml", folder / "train.yaml"
        backend = {"kind": "transformers", "model": str(folder / "big"), "dtype": "float32", "device": "cpu"}
        server_file.write_text(
            yaml.safe_dump(
                {
                    "edge": {"port": 50073},
                    "ray": {"num_cpus": 2, "object_store_mb": 100},
                    "teachers": [{"name": "t", "num_cpus": 0.2, "backend": backend}],
                }
            )
        )
        train_file.write_text(
            yaml.safe_dump(
                {
                    "run": {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
                    "model": {"path": str(folder / "small"), "dtype": "float32"},
                    "data": {"train": [str(rows)]},
                    "teacher": {"address": "127.0.0.1:50073", "wait_s": 120},
                    "train": {"max_steps": 3, "accumulation": 1, "log_steps": 1},
                }
            )
        )
        server = subprocess.Popen([str(teacher / "teacher-server"), "up", str(server_file)])
        try:
            done = subprocess.run([str(student / "student-trainer"), "train", str(train_file)], check=False)
            refused = subprocess.run(
                [str(student / "student-trainer"), "train", str(train_file), "teacher.address=null", f"teacher.embedded={server_file}",
                 f"run.output_dir={folder / 'other'}"], capture_output=True, text=True, check=False,
            )  # fmt: skip
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
        assert done.returncode == 0 and (folder / "run" / "final" / "adapter_model.safetensors").is_file()
        assert refused.returncode == 2 and "teacher extra" in refused.stderr, refused.stderr
        print("fine: the teacher extra serves, the student extra trains against it, neither has the other's packages")


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s")
