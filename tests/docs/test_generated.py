"""Generated pages and numbers are what their sources say: settings from the models, errors from the classes, figures from the benches' JSON."""

from __future__ import annotations

import re

import pytest

from deploy.docs import errors, numbers, settings
from deploy.docs.pages import ROOT, wanted
from student_trainer.config.run import TrainConfig
from student_trainer.config.traces import TracesConfig
from teacher_server.config.server import ServerConfig

WANTED = wanted()


@pytest.mark.parametrize("path", WANTED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_committed_is_current(path):
    assert path.is_file() and path.read_text() == WANTED[path], "make reference writes it anew"


@pytest.mark.parametrize(
    ("kind", "page"),
    [(TrainConfig, "run"), (ServerConfig, "server"), (TracesConfig, "traces")],
    ids=["run", "server", "traces"],
)
def test_every_setting_has_a_meaning_a_default_and_a_page(kind, page):
    text = (ROOT / "docs" / "reference" / f"{page}_settings.md").read_text()
    entries = dict(re.findall(r'^- <a id="key-[^"]+"></a>\*\*`(\w+)`\*\* \((.*)$', text, re.MULTILINE))
    models = {model for _, model in settings._sections(kind, "")}
    for model in models:
        told = settings.meanings(model)
        for name, field in model.model_fields.items():
            assert len(told.get(name, "").split()) >= 1 and name in entries, f"{model.__name__}.{name}"
            assert field.is_required() or "default" in entries[name] or "required" in entries[name], name
    assert sum(len(model.model_fields) for model in models) <= len(re.findall(r'^- <a id="key-', text, re.MULTILINE))


def test_a_setting_without_a_meaning_is_an_error():
    class Silent(TrainConfig):
        unheard_of: int = 0

    with pytest.raises(settings.UndescribedError, match=r"Silent\.unheard_of"):
        settings.settings_page(settings.Page(Silent, "x", "y"))


def test_every_public_error_has_its_cause_and_way_out():
    classes, told = {one.name for one in errors.error_classes()}, errors.told()
    assert classes == told.keys()
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    for name, entry in told.items():
        assert f"### {name}\n" in page or f"| `{name}` |" in page
        assert entry.keys() <= {"inside"} or {"cause", "fix"} <= entry.keys(), name
    assert {"ConfigError", "TeacherHeadMismatch", "ServerConfigError", "OverloadedError"} <= classes


def test_an_unknown_number_is_an_error(tmp_path):
    with pytest.raises(KeyError, match=r"no number is called x\.y"):
        numbers.filled("<!-- number: x.y -->1<!-- /number -->", tmp_path)


def test_a_changed_number_is_put_right(tmp_path):
    right = numbers.filled("<!-- number: real.gkd -->9.999<!-- /number -->", tmp_path)
    assert right == f"<!-- number: real.gkd -->{numbers.NUMBERS['real.gkd']()}<!-- /number -->" and "9.999" not in right
