"""Must show 6, and what a running server follows: scale with the load, roll to new weights, take a changed config.

One server for all; the tests run in order and each leaves it serving. The long version is tests/soak/test_rolling.py.
"""

import asyncio
import copy
import json
import re
import urllib.request

import pytest
import yaml

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import NotFoundError, OverloadedError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.fake_teacher import FakeTeacher
from tests.e2e.conftest import TRIED_ONCE, run_cli, server_config, serving
from tests.e2e.load import SPEC, Crowd, until

pytestmark = pytest.mark.ray
SCALING = {"min_replicas": 1, "max_replicas": 2, "target_queued_tokens": 400, "upscale_delay_s": 0.5}
FAKE = {
    "name": "fake",
    "num_cpus": 0.1,
    "backend": {"kind": "fake", "delay_s": 0.05},
    "batch": {"max_tokens": 128},
    "autoscaling": {**SCALING, "downscale_delay_s": 1.0},
}


def fingerprint(seed):
    return FakeTeacher(seed=seed).teacher_info().fingerprint


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("scaling"), server_config(FAKE), **TRIED_ONCE) as running:
        running.config = yaml.safe_load(running.config_file.read_text())
        yield running


@pytest.fixture
def change(server):
    """Rewrites the config that the server watches; undone when the test ends."""
    before = server.config_file.read_text()

    def write(edit):
        config = copy.deepcopy(server.config)
        edit(config)
        server.config_file.write_text(yaml.safe_dump(config))
        return config

    yield write
    if server.config_file.read_text() != before and yaml.safe_load(before) != server.config:
        server.config_file.write_text(before)


async def said(server, text, after=0):
    await until(lambda: text in server.log()[after:])


async def replicas(client, running, wanted=None):
    (teacher,) = (await client.server_status()).teachers
    return (teacher.replicas, teacher.replicas_wanted) == (running, wanted or running)


async def test_replicas_come_and_go_with_the_queue_and_no_request_fails(server):
    crowd = Crowd(server.address)
    async with TeacherClient(server.address) as client:
        async with crowd.asking(16):
            await until(lambda: replicas(client, 2))
        busy = crowd.tally.answered
        async with crowd.asking(1):
            await until(lambda: replicas(client, 1))
            await asyncio.sleep(1)  # the last one has been drained too
    assert crowd.tally.troubles == [] and crowd.tally.told == 0
    assert busy > 50 and crowd.tally.answered > busy


async def test_new_weights_replace_old_ones_under_load_and_are_never_mixed(server):
    server.config["teachers"][0]["autoscaling"]["min_replicas"] = 2  # so that both kinds live for a while
    server.config["teachers"][0]["backend"]["seed"] = 1
    crowd, mark = Crowd(server.address), len(server.log())
    async with crowd.asking(6), crowd.asking(3, pinned=False), TeacherClient(server.address) as client:
        await until(lambda: crowd.tally.answers[fingerprint(0)] > 20)
        server.config_file.write_text(yaml.safe_dump(server.config))
        await said(server, "the new version is up", mark)
        after = crowd.tally.answers[fingerprint(1)]
        await until(lambda: crowd.tally.answers[fingerprint(1)] > after + 50)
        assert (await client.teacher()).fingerprint == fingerprint(1)
        status = await client.server_status()
        assert status.teachers[0].fingerprints == (fingerprint(1),)
        assert status.teachers[0].state == "running"
    assert crowd.tally.troubles == []
    assert set(crowd.tally.answers) == {fingerprint(0), fingerprint(1)}
    assert crowd.tally.told == 6, "each student that wanted the old weights was told once, when they were gone"
    assert "rolling to the new version" in server.log()[mark:]


async def test_quotas_and_weights_change_while_everything_runs(server, change):
    batch = TokenBatch.pack([[1, 2, 3, 4]])
    change(lambda config: config.update(tenants={"default": {"tokens_per_s": 0.1, "weight": 2.5}}))
    async with TeacherClient(server.address, retry_for_s=0, on_trouble=lambda error: None) as client:
        info = await client.teacher()

        async def refused():
            try:
                await client.score(info, SPEC, TokenBatch.pack([[next(numbers) % 64, next(numbers) // 64 % 64, 1]]))
            except OverloadedError as error:
                return "tokens_per_s" in error.field
            return False

        numbers = iter(range(10**6))
        await until(refused)
        assert (await client.server_status()).tenants[0].weight == 2.5
        change(lambda config: None)
        await said(server, "tenants.default", server.log().rindex("tenants"))

        async def accepted():
            return not await refused()

        await until(accepted)
        assert (await client.score(info, SPEC, batch)).rows == 3


async def test_teachers_are_added_and_taken_away(server, change):
    mark = len(server.log())
    change(lambda config: config["teachers"].append({**FAKE, "name": "second"}))
    async with TeacherClient(server.address) as client:
        await said(server, "second: the new version is up", mark)

        async def there():
            return len(await client.describe()) == 2

        await until(there)
        info = await client.teacher("second")
        assert (await client.score(info, SPEC, TokenBatch.pack([[1, 2]]))).rows == 1
        change(lambda config: None)
        await said(server, "second: gone", mark)
        with pytest.raises(NotFoundError):
            await client.teacher("second")
        assert (await client.teacher("fake")).name == "fake"
    assert "fake: rolling" not in server.log()[mark:], "the other one was left alone"


async def test_what_cannot_be_followed_is_one_line_and_changes_nothing(server, change):
    mark = len(server.log())
    crowd = Crowd(server.address)
    async with crowd.asking(2):
        change(lambda config: config["edge"].update(port=1))
        await said(server, "edge.port: takes a restart", mark)
        server.config_file.write_text("teachers: [{nmae: x}]")
        await said(server, "nmae", mark)
        change(lambda config: config["teachers"][0].update(num_cpus=100))
        await said(server, "the cluster has", mark)
        change(lambda config: config["teachers"][0]["backend"].update(vocab_rows=10**12))  # 58 TiB: no machine of ours
        await said(server, "going back to the version before", mark)
        await said(server, "the version before is up", mark)
    assert crowd.tally.troubles == [] and crowd.tally.told == 0
    (why,) = [line for line in server.log()[mark:].splitlines() if "going back" in line]
    assert "Unable to allocate" in why
    async with TeacherClient(server.address) as client:
        assert (await client.teacher()).fingerprint == fingerprint(1)
        assert "Unable to allocate" in (await client.server_status()).teachers[0].message


def test_status_as_a_user_asks_for_it(server):
    shown = run_cli("status", "--address", server.address, house="teacher_server")
    assert shown.returncode == 0, shown.stderr
    assert re.search(rf"fake +running +{fingerprint(1)[:8]} +2 ", shown.stdout), shown.stdout
    assert "(no name)" in shown.stdout and "labels:" in shown.stdout
    asked = run_cli("status", "--json", "--address", server.address, house="teacher_server")
    tree = json.loads(asked.stdout)
    assert tree["teachers"][0]["answered"] > 100 and tree["tenants"][0]["served_tokens"] > 1000
    nobody = run_cli("status", "--address", "127.0.0.1:1", house="teacher_server")
    assert nobody.returncode == 75 and "127.0.0.1:1" in nobody.stderr


async def test_prometheus_finds_the_same_figures(server):
    (url,) = re.findall(r"metrics at (\S+)", server.log())

    def series():
        text = urllib.request.urlopen(url).read().decode()
        return [line for line in text.splitlines() if line.startswith("ray_lyceum_")]

    found = {}

    async def complete():
        lines = await asyncio.to_thread(series)
        found.clear()
        found.update({name: [line for line in lines if line.startswith(name)] for name in WANTED})
        return all(found.values())

    await until(complete)
    ours = [line for line in found["ray_lyceum_forward_tokens_total"] if 'teacher="fake"' in line]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in ours) > 1000


WANTED = (
    "ray_lyceum_forward_tokens_total",
    "ray_lyceum_queued_tokens",
    "ray_lyceum_replicas",
    "ray_lyceum_store_sequences_total",
    "ray_lyceum_tenant_served_tokens_total",
    "ray_lyceum_tenant_inflight_tokens",
    "ray_lyceum_open_streams",
)
