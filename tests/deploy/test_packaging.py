"""What goes with a release: one version, names that agree, and files around the code that can be read by what reads them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import teacher_server
import teacher_wire
from teacher_server.config.files import parse_as
from teacher_server.config.server import ServerConfig
from teacher_wire.diagnosis.examples import copy_examples, examples_folder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_there_is_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", teacher_wire.__version__)
    assert teacher_server.__version__ == teacher_wire.__version__
    assert (
        PROJECT["project"]["dynamic"] == ["version"]
        and PROJECT["tool"]["hatch"]["version"]["path"] == "proto/teacher_wire/__init__.py"
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == teacher_wire.__version__ and citation["license"] == PROJECT["project"]["license"]
    assert f"## {teacher_wire.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"Protocol {teacher_wire.PROTOCOL}." in (ROOT / "CHANGELOG.md").read_text()


def test_the_name_is_the_same_everywhere():
    name = PROJECT["project"]["name"]
    assert name == "lyceum-distill"
    for path in [
        *(ROOT / "student_trainer").rglob("*.py"),
        *(ROOT / "teacher_server").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
    ]:
        assert not re.search(r"pip install '?lyceum\[", path.read_text()), path


def test_the_examples_that_an_installation_carries_can_be_copied(tmp_path):
    copied = copy_examples(tmp_path)
    assert {path.name for path in copied.glob("*.yaml")} == {path.name for path in examples_folder().glob("*.yaml")}
    assert (copied / ".." / "schema" / "run.schema.json").is_file()  # by the first line of each config
    with pytest.raises(FileExistsError, match="there already"):
        copy_examples(tmp_path)
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert all((ROOT / source).is_dir() for source in included)


def test_the_manifests_and_their_config_can_be_read():
    parts = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "teacher.yaml").read_text()))
    assert [part["kind"] for part in parts] == [
        "ConfigMap",
        "Deployment",
        "PersistentVolumeClaim",
        "Service",
        "NetworkPolicy",
    ]
    config = parse_as(ServerConfig, yaml.safe_load(parts[0]["data"]["server.yaml"]), "ConfigMap")
    container = parts[1]["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": config.edge.port, "metrics": config.ray.metrics_port}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for path in (
        config.edge.tls.cert_file,
        config.edge.tokens_file,
        config.edge.store.folder,
        Path(container["args"][-1]),
    ):
        assert any(str(path).startswith(mount) for mount in mounts), path
    assert parts[1]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= config.edge.drain_s + 10


def test_the_unit_and_the_image_name_what_is_there():
    unit = (ROOT / "deploy" / "systemd" / "teacher-server.service").read_text()
    assert "KillMode=mixed" in unit and "RestartPreventExitStatus=2" in unit
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_the_forge_reads_can_be_read(path):
    read = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        runs = [step["run"] for job in read["jobs"].values() for step in job["steps"] if "run" in step]
        assert ".ci/run" in runs
        targets = {run.split()[1] for run in runs if run.startswith("make ")}
        assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
