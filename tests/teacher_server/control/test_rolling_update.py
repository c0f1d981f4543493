"""Rolling, adding, removing and putting back teachers, against a cluster that does as the test says."""

import pytest

from teacher_server.config.server import ServerConfig, TeacherConfig
from teacher_server.control.rolling_update import Deployed, Rollout, changes
from teacher_server.errors import ServerConfigError


def teacher(name="t", **changes):
    return TeacherConfig.model_validate({"name": name, "backend": {"kind": "fake", **changes}})


class Cluster:
    def __init__(self):
        self.orders = []
        self.found = {}

    def deploy(self, config, generation):
        self.orders.append((config.name, config.backend.seed, generation))
        self.found[config.name] = Deployed("deploying", replicas={"starting": 1})

    def remove(self, name):
        self.orders.append(("remove", name))

    def look(self):
        return self.found


def up(*configs):
    """A rollout whose teachers have come up."""
    cluster, said = Cluster(), []
    rollout = Rollout(cluster, said.append, lambda: 0.0)
    rollout.want(configs)
    for name in cluster.found:
        cluster.found[name] = Deployed("running", replicas={"running": 1})
    rollout.start()
    assert rollout.settled
    return rollout, cluster, said


def test_a_first_start_that_fails_says_why():
    cluster = Cluster()
    rollout = Rollout(cluster, print, lambda: 0.0)
    rollout.want([teacher()])
    rollout.start()
    assert not rollout.settled
    cluster.found["t"] = Deployed("failed", "no such weights")
    with pytest.raises(ServerConfigError, match="no such weights"):
        rollout.start()


def test_only_a_changed_teacher_is_rolled_and_every_roll_has_a_later_generation():
    rollout, cluster, said = up(teacher("a"), teacher("b"))
    rollout.want([teacher("a"), teacher("b", seed=1)])
    assert cluster.orders == [("a", 0, 1), ("b", 0, 2), ("b", 1, 3)]
    assert "backend.seed" in said[-1]
    plans = rollout.step()
    assert (plans["a"].state, plans["b"].state) == ("running", "rolling")
    cluster.found["b"] = Deployed("deploying", replicas={"running": 1, "starting": 1})
    rollout.step()
    rollout.step()
    assert [line for line in said if "1 running, 1 starting" in line] == [said[-1]], "progress is said once"
    cluster.found["b"] = Deployed("running", replicas={"running": 1})
    assert rollout.step()["b"].state == "running" and rollout.settled
    assert "up after" in said[-1]


def test_a_version_that_cannot_come_up_is_taken_back_and_says_so_until_the_next():
    rollout, cluster, said = up(teacher())
    rollout.want([teacher(seed=1)])
    cluster.found["t"] = Deployed("failed", "torn file", {"running": 1})
    rollout.step()
    assert cluster.orders[-1] == ("t", 0, 3) and "torn file" in said[-1]
    assert rollout.step()["t"].state == "rolling"
    cluster.found["t"] = Deployed("running", replicas={"running": 1})
    plan = rollout.step()["t"]
    assert plan.state == "running" and "torn file" in plan.message
    rollout.want([teacher(seed=2)])
    cluster.found["t"] = Deployed("running", replicas={"running": 1})
    assert rollout.step()["t"].message == ""


def test_putting_back_what_cannot_come_up_either_is_reported_and_not_repeated():
    rollout, cluster, _ = up(teacher())
    rollout.want([teacher(seed=1)])
    cluster.found["t"] = Deployed("failed", "x")
    rollout.step()
    orders = len(cluster.orders)
    cluster.found["t"] = Deployed("failed", "y")
    for _ in range(3):
        rollout.step()
    assert len(cluster.orders) == orders


def test_added_and_removed_teachers():
    rollout, cluster, said = up(teacher("a"))
    rollout.want([teacher("b")])
    assert cluster.orders[1:] == [("remove", "a"), ("b", 0, 2)]
    assert list(rollout.step()) == ["b"]
    del cluster.found["a"]
    cluster.found["b"] = Deployed("failed", "too large")
    rollout.step()
    assert any("a: gone" in line for line in said) and any("too large" in line for line in said)
    assert cluster.orders[-1] == ("remove", "b") and rollout.step() == {}
    del cluster.found["b"]
    rollout.step()
    assert rollout.settled


def test_a_newer_change_overtakes_a_roll():
    rollout, cluster, _ = up(teacher())
    rollout.want([teacher(seed=1)])
    rollout.want([teacher(seed=2)])
    cluster.found["t"] = Deployed("failed", "x")
    rollout.step()
    assert cluster.orders[1:] == [("t", 1, 2), ("t", 2, 3), ("t", 0, 4)], "back to what last came up"


def test_changes_are_named_by_their_dotted_fields():
    tree = {"teachers": [{"name": "a", "backend": {"kind": "fake"}}]}
    old = ServerConfig.model_validate(tree).model_dump()
    new = ServerConfig.model_validate({**tree, "edge": {"port": 1}, "tenants": {"x": {}}}).model_dump()
    assert changes(old, old) == []
    assert changes(old, new) == ["edge.port", "tenants.x"]


def test_what_an_up_before_left_is_adopted_changed_or_removed():
    cluster, said = Cluster(), []
    cluster.found = {
        name: Deployed("running", replicas={"running": 1}) for name in ("same", "other", "gone", "unknown")
    }
    held = {"same": (teacher("same"), 4), "other": (teacher("other"), 9), "gone": (teacher("gone"), 5)}
    rollout = Rollout(cluster, said.append, lambda: 0.0)
    rollout.adopt(held)
    rollout.want([teacher("same"), teacher("other", seed=1), teacher("new")])
    assert cluster.orders == [("remove", "unknown"), ("remove", "gone"), ("other", 1, 10), ("new", 0, 11)]
    assert rollout.deployed["same"] == (teacher("same"), 4)
    plans = rollout.step()
    assert (plans["same"].state, plans["other"].state, plans["new"].state) == ("running", "rolling", "starting")


def test_an_adopted_teacher_goes_back_if_its_new_version_cannot_come_up():
    cluster, said = Cluster(), []
    cluster.found = {"t": Deployed("running", replicas={"running": 1})}
    rollout = Rollout(cluster, said.append, lambda: 0.0)
    rollout.adopt({"t": (teacher(), 1)})
    rollout.want([teacher(seed=7)])
    cluster.found["t"] = Deployed("failed", "no room")
    rollout.step()
    assert cluster.orders[-1] == ("t", 0, 3)


def test_a_failed_deployment_is_not_adopted():
    cluster = Cluster()
    cluster.found = {"t": Deployed("failed", "torn")}
    rollout = Rollout(cluster, print, lambda: 0.0)
    rollout.adopt({"t": (teacher(), 1)})
    assert cluster.orders == [("remove", "t")] and not rollout.deployed
