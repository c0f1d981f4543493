"""The borders of CONTRIBUTING.md: who may import whom, seen from clean interpreters and from the import contracts."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "transformers", "vllm", "peft"}


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("code", "never"),
    [
        (
            "import teacher_wire.endpoint.client, teacher_wire.endpoint.servicer, teacher_wire.testing.loopback, teacher_wire.testing.fake_teacher",
            HEAVY | {"pydantic", "rich", "typer"},
        ),
        ("import teacher_server.cli.main, teacher_server.config.server", HEAVY | {"student_trainer"}),
        ("import student_trainer.cli.main, student_trainer.config.run", HEAVY | {"teacher_server"}),
        ("import teacher_server.replica.score_queue, teacher_server.decoding.scheduler", HEAVY),
        (
            "import teacher_server.control.launch, teacher_server.edge.server, teacher_server.replica.engine",
            {"student_trainer", "torch"},
        ),
        ("import teacher_server.backends.transformers.backend", {"student_trainer", "ray"}),
        ("import teacher_server.backends.vllm.backend", {"student_trainer", "ray", "vllm"}),
        ("import student_trainer.training.run, student_trainer.evaluation.report", {"teacher_server", "ray"}),
        (
            "import student_trainer.rollout.engines.vllm_engine, student_trainer.rollout.engines.vllm_worker",
            {"teacher_server", "ray", "vllm"},
        ),
        ("import student_trainer.losses.output.loss", {"teacher_server", "ray", "transformers", "peft", "grpc"}),
    ],
)
def test_importing_a_room_loads_only_what_it_may(code, never):
    assert not loaded_by(code) & never


@pytest.mark.parametrize("house", ["teacher_server", "student_trainer"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["up", "--help"],
        ["train", "--help"],
        ["describe", "--help"],
        ["label", "--help"],
        ["cache", "--help"],
        ["status", "--help"],
    ],
)
def test_help_is_light(house, arguments):
    code = (
        f"import sys; sys.argv = ['x', *{arguments!r}]\n"
        f"from {house}.cli.main import main\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main()"
    )
    assert not loaded_by(code) & HEAVY


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
