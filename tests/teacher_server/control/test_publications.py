"""Published revisions against a cluster that does as the test says: deployed, given up, kept, deleted; and what a restart finds."""

import json
import shutil
from pathlib import Path

import pytest

from teacher_server.config.server import ServerConfig, TeacherConfig
from teacher_server.control.preflight import check_files
from teacher_server.control.publications import Publications
from teacher_server.control.rolling_update import Deployed, Rollout
from teacher_server.errors import ServerConfigError
from teacher_server.publishing import blueprint
from teacher_server.publishing.blueprint import Blueprint
from teacher_server.publishing.revisions import Revisions, model_key, published, revision_of

A, B, C, D = (letter * 64 for letter in "abcd")


class Cluster:
    def __init__(self):
        self.orders, self.found = [], {}

    def deploy(self, config, generation):
        self.orders.append(revision_of(config)[:1] or Path(config.backend.model).name)
        self.found[config.name] = Deployed("deploying", replicas={"running": 1, "starting": 1})

    def remove(self, name):
        self.orders.append(f"remove {name}")

    def look(self):
        return self.found

    def becomes(self, state, why="", **replicas):
        self.found["me"] = Deployed(state, why, replicas or {"running": 1})


class Server:
    """What `up` is made of, for one teacher."""

    def __init__(self, folder, model, held=None, **changes):
        publish = {"tenants": ["t"], "folder": str(folder), "keep": 2}
        backend = {"kind": "transformers", "model": str(model)}
        self.config = TeacherConfig.model_validate({"name": "me", "backend": backend, "publish": publish} | changes)
        self.cluster, self.said = Cluster(), []
        self.rollout = Rollout(self.cluster, self.said.append, lambda: 0.0)
        self.publications = Publications(self.rollout, self.said.append)
        self.publications.prepare([self.config])
        self.revisions = Revisions.of(self.config.publish, "me")
        if held:
            self.cluster.becomes("running")
            self.rollout.adopt({"me": (held, 7)})
        self.rollout.want(self.publications.wanted([self.config]))
        self.cluster.becomes("running")
        self.rollout.step()

    def publish(self, name):
        self.revisions.path(name).mkdir()
        self.revisions.want(model_key(self.config), name)

    def step(self):
        self.rollout.want(self.publications.wanted([self.config]))
        plans = self.publications.told([self.config], self.rollout.step())
        self.publications.step([self.config])
        return plans["me"]

    def comes_up(self):
        self.step()
        self.cluster.becomes("running")
        self.step()

    @property
    def runs(self):
        return revision_of(self.rollout.deployed["me"][0])

    @property
    def there(self):
        return {path.name[0] for path in self.revisions.folder.iterdir() if len(path.name) == 64}


@pytest.fixture
def model(model_factory):
    return model_factory("qwen2")


@pytest.fixture
def server(tmp_path, model):
    return Server(tmp_path, model)


def test_each_revision_is_rolled_and_the_oldest_go(server):
    for name in (A, B, C):
        server.publish(name)
        server.comes_up()
        assert server.runs == name
    assert server.cluster.orders[1:] == ["a", "b", "c"] and server.there == {"b", "c"}
    assert any("is deleted; publish.keep is 2" in line for line in server.said)
    orders = len(server.cluster.orders)
    for _ in range(3):
        plan = server.step()
    assert len(server.cluster.orders) == orders, "and nothing more happens"
    assert plan.publish == server.config.publish and plan.model == model_key(server.config)


def test_a_roll_under_way_is_not_overtaken(server):
    server.publish(A)
    server.step()
    server.publish(B)
    server.step()
    assert server.cluster.orders[1:] == ["a"]
    server.cluster.becomes("running")
    server.step()
    server.step()
    assert server.cluster.orders[1:] == ["a", "b"]


def test_what_cannot_come_up_is_given_up_for_good(server, tmp_path, model):
    server.publish(A)
    server.comes_up()
    server.publish(B)
    server.step()
    server.cluster.becomes("failed", "no memory for it")
    server.step()
    assert server.cluster.orders[1:] == ["a", "b", "a"] and server.revisions.wanted(model_key(server.config)) == [A]
    server.cluster.becomes("running")
    assert "no memory for it" in server.revisions.given_up(B)
    for _ in range(3):
        server.step()
    assert server.cluster.orders[1:] == ["a", "b", "a"] and server.there == {"a"}, "and deleted"
    server.publish(B)  # published anew: tried anew
    server.comes_up()
    assert server.revisions.given_up(B) == ""
    assert server.runs == B


def test_the_model_of_the_config_is_put_back_if_the_first_revision_fails(server):
    server.publish(A)
    server.step()
    server.cluster.becomes("failed", "x")
    server.step()
    assert server.runs == "" and server.revisions.wanted(model_key(server.config)) == []


def test_a_publisher_without_pause_does_not_fill_the_disk(server):
    """One roll follows the other at once, and somebody always holds the lock: old revisions go all the same."""
    names = [f"{number:064x}" for number in range(1, 9)]
    with server.revisions.locked() as held:
        assert held
        for name in names:
            server.publish(name)
            server.step()  # the roll before has ended: this one begins
            assert len([path for path in server.revisions.folder.iterdir() if len(path.name) == 64]) <= 3
            server.cluster.becomes("running", running=1, stopping=1)
    server.step()
    assert {path.name for path in server.revisions.folder.iterdir() if len(path.name) == 64} == set(names[-2:])


def test_what_is_put_back_is_not_deleted(tmp_path, model):
    publish = {"tenants": ["t"], "folder": str(tmp_path), "keep": 1}
    server = Server(tmp_path, model, publish=publish)
    for name in (A, B):
        server.publish(name)
        server.comes_up()
    assert server.there == {"b"}
    server.publish(C)
    server.step()
    assert server.there == {"b", "c"}
    server.cluster.becomes("failed", "x")
    server.step()
    assert server.runs == B and server.there == {"b"}


def test_the_operator_has_the_last_word(server, tmp_path, model, model_factory):
    server.publish(A)
    server.comes_up()
    server.config = server.config.model_copy(update={"max_ongoing_requests": 7})
    server.comes_up()
    assert server.runs == A and server.rollout.deployed["me"][0].max_ongoing_requests == 7
    other = model_factory("qwen2", seed=9)
    backend = server.config.backend.model_copy(update={"model": str(other)})
    server.config = server.config.model_copy(update={"backend": backend})
    server.comes_up()
    assert server.runs == "" and server.rollout.deployed["me"][0].backend.model == str(other)
    server.config = server.config.model_copy(update={"publish": None})
    server.comes_up()
    assert server.rollout.deployed["me"][0].publish is None


def test_a_restart_goes_on_with_the_newest_revision(server, tmp_path, model):
    server.publish(A)
    server.comes_up()
    held = server.rollout.deployed["me"][0]
    assert Server(tmp_path, model).cluster.orders == ["a"]
    assert Server(tmp_path, model, held=held).cluster.orders == [], "adopted as it runs"
    (server.revisions.folder / "wanted.json").write_text("{")
    assert Server(tmp_path, model).cluster.orders == [model.name]
    server.revisions.want(model_key(server.config), A)
    shutil.rmtree(server.revisions.path(A))
    assert published(server.config) == server.config, "deleted by hand"


def test_a_deletion_that_was_cut_short_is_ended(server):
    (server.revisions.folder / f".going-{A}").mkdir()
    server.step()
    assert not (server.revisions.folder / f".going-{A}").exists()


def test_the_blueprint_follows_the_model(tmp_path, model, model_factory):
    server = Server(tmp_path, model)
    first = Blueprint.read(server.revisions)
    assert first.model == model_key(server.config) and first.config["model_type"] == "qwen2"
    assert first.shapes["model.norm.weight"] == (32,) and "lm_head.weight" not in first.shapes
    assert not list(first.folder.glob("*.safetensors")) and (first.folder / "tokenizer.json").is_file()
    made = (first.folder / "config.json").stat().st_mtime_ns
    Server(tmp_path, model)
    assert (first.folder / "config.json").stat().st_mtime_ns == made, "made once"
    Server(tmp_path, model_factory("qwen2", hidden=64))
    assert Blueprint.read(server.revisions).shapes["model.norm.weight"] == (64,)


def test_a_model_in_several_files_is_published_in_several(tmp_path, model):
    """And the index is the server's own."""
    from safetensors.torch import load_file, save_file

    copy, weights = shutil.copytree(model, tmp_path / "split"), load_file(model / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    where = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, copy / file)
        where |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    server = Server(tmp_path / "kept", copy)
    base = Blueprint.read(server.revisions)
    assert base.shapes.keys() == weights.keys()
    target = tmp_path / "revision"
    target.mkdir()
    base.complete(target, where, 1)
    assert json.loads((target / "model.safetensors.index.json").read_text())["weight_map"] == where


def test_what_cannot_be_published_is_refused_by_name(tmp_path, model):
    with pytest.raises(ValueError, match="backend fake has no weights"):
        TeacherConfig.model_validate({"name": "me", "backend": {"kind": "fake"}, "publish": {"tenants": ["t"]}})
    for wrong in (
        {"tenants": []},
        {"tenants": ["a b"]},
        {"tenants": ["t"], "keep": 0},
        {"tenants": ["t"], "max_gb": 0},
    ):
        with pytest.raises(ValueError):
            TeacherConfig.model_validate({"name": "me", "backend": {"model": str(model)}, "publish": wrong})
    (tmp_path / "file").write_text("")
    backend = {"kind": "transformers", "model": str(model)}
    publish = {"tenants": ["t"], "folder": str(tmp_path / "file" / "x")}
    config = ServerConfig.model_validate({"teachers": [{"name": "me", "backend": backend, "publish": publish}]})
    with pytest.raises(ServerConfigError, match=r"teachers\.me\.publish\.folder"):
        check_files(config)
    with pytest.raises(ServerConfigError, match=r"teachers\.me\.publish\.folder"):
        blueprint.make(config.teachers[0])
