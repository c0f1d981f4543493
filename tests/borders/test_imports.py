"""The borders of CONTRIBUTING.md: who may import whom, seen from clean interpreters and from the import contracts."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "transformers", "vllm", "peft"}


def loaded_by(*steps: str) -> list[set[str]]:
    """Top-level modules in one fresh interpreter after each piece of code, those of the pieces before among them."""
    say = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    script = "\n".join(["import sys", *(line for step in steps for line in (step, say))])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in result.stdout.splitlines()]


# Each a fresh interpreter, in which a room is imported behind those that load less: what it may not load, they may not either.
@pytest.mark.parametrize(
    "rooms",
    [
        [
            (
                "import teacher_wire.endpoint.client, teacher_wire.endpoint.servicer, teacher_wire.testing.loopback, teacher_wire.testing.fake_teacher",
                HEAVY | {"pydantic", "rich", "typer"},
            )
        ],
        [("import teacher_server.cli.main, teacher_server.config.server", HEAVY | {"student_trainer"})],
        [("import student_trainer.cli.main, student_trainer.config.run", HEAVY | {"teacher_server"})],
        [("import teacher_server.replica.score_queue, teacher_server.decoding.scheduler", HEAVY)],
        [
            (
                "import teacher_server.control.launch, teacher_server.edge.server, teacher_server.replica.engine",
                {"student_trainer", "torch"},
            )
        ],
        [
            ("import teacher_server.backends.transformers.backend", {"student_trainer", "ray", "vllm"}),
            ("import teacher_server.backends.vllm.backend", {"student_trainer", "ray", "vllm"}),
        ],
        [
            ("import student_trainer.losses.output.loss", {"teacher_server", "ray", "transformers", "peft", "grpc"}),
            (
                "import student_trainer.rollout.engines.vllm_engine, student_trainer.rollout.engines.vllm_worker",
                {"teacher_server", "ray", "vllm"},
            ),
            ("import student_trainer.training.run, student_trainer.evaluation.report", {"teacher_server", "ray"}),
        ],
    ],
    ids=["language", "server's commands", "student's commands", "queues", "control", "backends", "training"],
)
def test_importing_a_room_loads_only_what_it_may(rooms):
    for (code, never), loaded in zip(rooms, loaded_by(*(code for code, _ in rooms)), strict=True):
        assert not loaded & never, code


HELP = """
import contextlib, io
from {house}.cli.main import main
sys.argv = ['x', *{arguments!r}]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""


@pytest.mark.parametrize("house", ["teacher_server", "student_trainer"])
def test_help_is_light(house):
    commands = ["", "up", "train", "describe", "label", "cache", "status"]
    asked = [[*command.split(), "--help"] for command in commands]
    for arguments, loaded in zip(
        asked, loaded_by(*(HELP.format(house=house, arguments=arguments) for arguments in asked)), strict=True
    ):
        assert not loaded & HEAVY, arguments


def test_the_import_contracts_hold():
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_nothing_loads_code_from_data():
    """No pickle, no torch.load, no remote code on wire, cache or checkpoint."""
    root = Path(__file__).parents[2]
    for folder in ("proto", "teacher_server", "student_trainer"):
        for file in (root / folder).rglob("*.py"):
            text = file.read_text()
            for word in ("import pickle", "torch.load(", "torch.save(", "trust_remote_code=True", "eval(", "exec("):
                found = [
                    line
                    for line in text.splitlines()
                    if word in line and f".{word}" not in line and f"_{word}" not in line
                ]
                assert not found, f"{file}: {found}"
