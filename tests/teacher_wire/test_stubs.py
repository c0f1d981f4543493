"""The committed stubs are what the pinned generator makes of the .proto."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools" / "proto"


@pytest.mark.skipif(not TOOLS.is_dir(), reason="the generator is installed by `make test`")
def test_stubs_are_up_to_date(tmp_path):
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}",
        *outputs,
        str(ROOT / "proto/teacher_wire/v2/teacher.proto"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(TOOLS)})
    for name in ("teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py"):
        assert (tmp_path / "teacher_wire/v2" / name).read_text() == (
            ROOT / "proto/teacher_wire/v2" / name
        ).read_text(), name
