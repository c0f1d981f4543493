"""The JSON schemas of both houses' configs, as editors read them: they are current, and say of the examples what the commands say."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from student_trainer.config.run import TrainConfig
from student_trainer.config.schema import json_schema as of_student
from student_trainer.config.traces import TracesConfig
from teacher_server.config.schema import json_schema as of_server
from teacher_server.config.server import ServerConfig

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "run": of_student.json_schema(TrainConfig, "student-trainer: a run"),
    "traces": of_student.json_schema(TracesConfig, "student-trainer: traces"),
    "server": of_server.json_schema(ServerConfig, "teacher-server"),
}
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


def kind_of(path: Path) -> str:
    """Which schema the first line of an example names."""
    found = re.match(r"# yaml-language-server: \$schema=\.\./schema/(\w+)\.schema\.json\n", path.read_text())
    assert found, f"{path.name} does not begin with the line that names its schema"
    return found[1]


def faults(kind: str, tree: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMAS[kind])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(tree)]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_what_is_committed_is_current(kind):
    written = json.loads((ROOT / "deploy" / "schema" / f"{kind}.schema.json").read_text())
    assert written == SCHEMAS[kind], "make schemas writes them anew"
    jsonschema.Draft202012Validator.check_schema(written)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_what_their_schema_says(path):
    tree = yaml.safe_load(path.read_text())
    kind = kind_of(path)
    assert faults(kind, tree) == []
    wrong = copy.deepcopy(tree)
    wrong["teachers" if kind == "server" else "teacher"] = 7
    wrong["unknown"] = 1
    assert len(faults(kind, wrong)) >= 2


def test_what_the_reader_takes_the_schema_takes():
    tree = yaml.safe_load((ROOT / "deploy" / "examples" / "student-cpu.yaml").read_text())
    tree["data"]["train"] = "rows.jsonl#7"  # a single value for a list of it
    tree["train"]["report_to"] = "tensorboard"
    tree["data"]["eval"] = [{"path": "held.jsonl", "sample": 3}]
    tree["model"]["lora"] = {"target_modules": ["q_proj"]}
    assert faults("run", tree) == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_field_says_what_it_means(kind):
    """A section is described by its own first paragraph where its field says nothing more."""
    undescribed = [
        f"{name}.{field}"
        for name, section in [("", SCHEMAS[kind]), *SCHEMAS[kind]["$defs"].items()]
        for field, told in section.get("properties", {}).items()
        if "description" not in told and "$ref" not in json.dumps(told)
    ]
    assert undescribed == []
    output = SCHEMAS["run"]["$defs"]["OutputLossConfig"]["properties"]
    assert output["beta"]["description"].startswith("coefficient of `jsd`")


def test_both_houses_have_the_same_writer():
    one, other = (
        (ROOT / house / "config" / "schema" / "json_schema.py").read_text()
        for house in ("student_trainer", "teacher_server")
    )
    assert one.replace("student_trainer", "teacher_server") == other
