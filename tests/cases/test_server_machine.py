"""s08, s09, s11, s25, damaged weights and GPUs that nothing uses: what a machine, a cluster or a folder refuses is one line, before Ray starts."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import yaml

from teacher_server.backends.weight_files import check_weights
from teacher_server.config.server import EdgeConfig, RayConfig, ServerConfig
from teacher_server.control import preflight, ray_start
from teacher_server.control.preflight import check_machine, check_port, check_store
from teacher_server.errors import ServerConfigError
from tests.cases.material import command
from tests.e2e.conftest import free_port

FAKE = {"name": "fake", "backend": {"kind": "fake"}}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An ordinary machine's environment."""
    for name in ("TMPDIR", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return monkeypatch


def refusal(call, *arguments):
    with pytest.raises(ServerConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_temporary_folder_is_named_by_its_variable(machine, name):
    machine.setenv(name, "/tmp/" + "x" * 95)
    said = refusal(check_machine, RayConfig())
    assert said.startswith(f"{name} has 100 characters") and "RAY_TMPDIR" in said


def test_a_temporary_folder_that_is_none_is_named(machine, tmp_path):
    file = tmp_path / "f"
    file.write_text("")
    for folder in ("/no/such", str(file)):
        machine.setenv("TMPDIR", "/tmp")
        machine.setenv("RAY_TMPDIR", folder if len(folder) < 30 else "/proc/1")
        assert refusal(check_machine, RayConfig()).startswith("RAY_TMPDIR ")


def test_a_home_that_cannot_be_written_is_named_with_the_way_out(machine, tmp_path):
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", "/proc/1"):
        machine.setenv("HOME", str(home))
        said = refusal(check_machine, RayConfig())
        assert said.startswith(f"HOME {home}") and "RAY_AUTH_TOKEN" in said
    machine.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    check_machine(RayConfig())


def test_without_tokens_no_home_is_needed(machine):
    machine.setenv("HOME", "/proc/1")
    machine.setenv("RAY_AUTH_MODE", "disabled")
    check_machine(RayConfig())


def test_an_object_store_beyond_the_memory_is_named(machine):
    assert refusal(check_machine, RayConfig(object_store_mb=10**9)).startswith("ray.object_store_mb 1000000000: ")
    check_machine(RayConfig(object_store_mb=100))


def test_the_command_says_it_and_exits_with_2(tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text(yaml.safe_dump({"edge": {"port": free_port()}, "teachers": [FAKE]}))
    result = command("up", config, cwd=tmp_path, env={"RAY_TMPDIR": "/tmp/" + "x" * 95}, house="teacher_server")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "RAY_TMPDIR has 100 characters" in line


@pytest.mark.parametrize("place", ["file", "below a file", "/proc/lyceum"])
def test_a_store_that_keeps_nothing_is_refused_at_the_start(tmp_path, place):
    (tmp_path / "file").write_text("")
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}.get(place, place)
    assert refusal(check_store, type(tmp_path)(folder)).startswith(f"edge.store.folder {folder}: ")
    check_store(tmp_path / "new")


# The way to a cluster that is joined.


def test_a_head_that_is_down_or_mistyped_is_named_at_once():
    for address in (f"127.0.0.1:{free_port()}", "no.such.host.invalid:6379"):
        assert refusal(ray_start.check_head, address, print).startswith(f"ray.address {address}: nobody listens there")


def test_somebody_who_accepts_and_says_nothing_is_no_head(monkeypatch):
    monkeypatch.setattr(ray_start, "CONNECT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "not the head of a Ray cluster" in refusal(
            ray_start.check_head, f"127.0.0.1:{silent.getsockname()[1]}", print
        )


@pytest.fixture
def head():
    """What a head answers to Ray's first question; with a token, to nobody without it."""
    server = grpc.server(ThreadPoolExecutor(2))
    wanted = {"token": ""}

    class Answers(grpc.GenericRpcHandler):
        def service(self, details):
            if details.method != "/ray.rpc.NodeInfoGcsService/GetClusterId":
                return None

            def answer(request, context):
                if (
                    wanted["token"]
                    and dict(details.invocation_metadata).get("authorization") != f"Bearer {wanted['token']}"
                ):
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server.add_generic_rpc_handlers((Answers(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield address, wanted
    server.stop(None)


def test_a_head_without_tokens_is_joined(machine, head):
    ray_start.check_head(head[0], print)


def test_a_server_of_something_else_is_no_head():
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    assert "UNIMPLEMENTED" in refusal(ray_start.check_head, address, print)
    server.stop(None)


def test_one_side_with_a_token_is_said(machine, head):
    address, wanted = head
    wanted["token"] = "right"
    assert "there is none here" in refusal(ray_start.check_head, address, print)
    machine.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "not the one in RAY_AUTH_TOKEN" in refusal(ray_start.check_head, address, print)
    machine.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled" in refusal(ray_start.check_head, address, print)


def test_the_token_of_this_machine_is_taken_as_ray_start_takes_it(machine, head, tmp_path):
    address, wanted = head
    wanted["token"] = "right"
    (tmp_path / "home" / ".ray").mkdir()
    (tmp_path / "home" / ".ray" / "auth_token").write_text("right\n")
    machine.setenv("RAY_AUTH_MODE", "")  # set, so that it is set back
    said = []
    ray_start.check_head(address, said.append)
    assert "~/.ray/auth_token" in said[0] and ray_start.os.environ["RAY_AUTH_MODE"] == "token"


def test_a_ray_that_never_joins_is_given_up():
    script = "import time\nfrom teacher_server.control.ray_start import _deadline\nwith _deadline(0.2, 'too long'):\n    time.sleep(600)\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (2, "teacher-server: too long\n")


@pytest.mark.parametrize(("address", "own"), [(None, True), ("local", True), ("auto", False), ("head:6379", False)])
def test_whose_cluster_it_is_says_the_config_alone(monkeypatch, address, own):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6399")
    assert RayConfig(address=address).own is own


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", ""])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match="address"):
        RayConfig(address=address)


# The port of a server that runs.


def test_a_running_edge_of_ours_is_told_from_others(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        edge = EdgeConfig(port=other.getsockname()[1])
        assert "cannot listen" in refusal(check_port, edge)
        monkeypatch.setattr(preflight, "_listener", lambda port: "ray::ServeReplica:lyceum-edge:edge")
        assert check_port(edge) is True


def test_an_address_of_another_machine_is_refused():
    assert refusal(check_port, EdgeConfig.model_construct(host="192.0.2.77", port=free_port())).startswith("edge.")


# Weights and GPUs.


@pytest.fixture
def model(tmp_path):
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}
    )
    whole = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(whole)
    return tmp_path, whole


def test_whole_weights_pass(model):
    check_weights(str(model[0]))


@pytest.mark.parametrize(
    "spoil",
    [lambda w: b"", lambda w: w[:-1], lambda w: w + b"x", lambda w: b"torn", lambda w: w[:20], lambda w: w[:8] + b"x" + w[9:],
     lambda w: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
)  # fmt: skip
def test_a_damaged_weight_file_is_named(model, spoil):
    folder, whole = model
    (folder / "model.safetensors").write_bytes(spoil(whole))
    assert f"weight file {folder / 'model.safetensors'} is damaged" in refusal(check_weights, str(folder))


def test_a_missing_part_is_named(model):
    folder, _ = model
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in refusal(check_weights, str(folder))


@pytest.mark.parametrize(
    ("gpus", "spread", "right"),
    [(2, 2, True), (0, 2, True), (0.5, 1, True), (1, 2, False), (2, 1, False), (4, 2, False)],
)
def test_gpus_and_tensor_parallel_size_agree(gpus, spread, right):
    teacher = {"name": "t", "num_gpus": gpus, "backend": {"kind": "vllm", "model": "m", "tensor_parallel_size": spread}}
    if right:
        ServerConfig.model_validate({"teachers": [teacher]})
    else:
        with pytest.raises(ValueError, match="tensor_parallel_size"):
            ServerConfig.model_validate({"teachers": [teacher]})


@pytest.mark.parametrize(
    "edge",
    [{"keepalive_s": float("inf")}, {"keepalive_timeout_s": 1e9}, {"drain_s": float("nan")}, {"store": {"disk_gb": float("inf")}},
     {"store": {"disk_gb": 1e300}}],
)  # fmt: skip
def test_numbers_without_bounds_are_refused(edge):
    with pytest.raises(ValueError):
        EdgeConfig.model_validate(edge)
