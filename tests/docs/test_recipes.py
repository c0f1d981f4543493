"""The configs of recipes are configs: read by the same code as a file."""

import re
from pathlib import Path

import yaml

from student_trainer.config.teachers import TeacherConfig
from teacher_server.config.files import parse_as
from teacher_server.config.server import ServerConfig

GROUPS = Path(__file__).parents[2] / "docs" / "recipes" / "groups.md"


def test_one_teacher_for_three_groups():
    server, student = (
        yaml.safe_load(fence) for fence in re.findall(r"```yaml\n(.*?)```", GROUPS.read_text(), re.DOTALL)
    )
    config = parse_as(ServerConfig, server, "groups.md")
    named = set(re.search(r"for tenant in ([\w ]+);", GROUPS.read_text())[1].split())
    assert set(config.tenants) - {"default"} == named
    assert config.edge.tls is not None and config.edge.tokens_file is not None
    TeacherConfig.model_validate(student["teacher"])
