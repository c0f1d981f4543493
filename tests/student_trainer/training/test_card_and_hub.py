"""The model card of a finished run, and its way to a hub that speaks real HTTP, answers, refuses, or is away."""

import base64
import http.server
import io
import json
import threading

import pytest
import yaml
from rich.console import Console

from student_trainer.errors import ConfigError
from student_trainer.training.run import train
from student_trainer.training.tracking.card import licence_of
from student_trainer.training.tracking.hub import HubError

TOKEN = "hf_atokenofnobody"


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of the hub that an upload of small files makes."""

    def do_GET(self):
        self._answer({"name": "me", "type": "user"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.seen.append((self.path, body, self.headers.get("Authorization")))
        if server.refuses in self.path:
            return self._answer({"error": f"you may not write here, {TOKEN}"}, 403)
        if self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            said = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in files]
            return self._answer({"files": said})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": f"{server.url}/me/student/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )
        return self._answer({"url": f"{server.url}/me/student", "errors": [], "warnings": []})

    def _answer(self, said, status=200):
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.seen, server.files, server.refuses = [], {}, "nothing"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def quiet():
    return Console(file=io.StringIO(), width=300)


def test_a_card_says_what_the_run_was(config_of, model_factory):
    config = config_of(model={"quantize": None}, loss={"sft_weight": 0.1}, train={"max_steps": 3, "save_steps": 0})
    result = train(config, console=quiet())
    text = (result.output_dir / "final" / "README.md").read_text()
    meta = yaml.safe_load(text.split("---\n")[1])
    assert meta["library_name"] == "peft" and {"distillation", "lora"} <= set(meta["tags"]) and "base_model" not in meta
    logged = [entry for entry in result.curve if "loss" in entry]
    for figure in (
        logged[0]["kd_loss"],
        logged[-1]["kd_loss"],
        result.metrics["kl_to_teacher"],
        result.metrics["acc1"],
    ):
        assert f"{figure:.4f}" in text
    assert "LoRA, rank 4, alpha 32" in text and "forward_kl + 0.1 x cross-entropy" in text
    assert "3 of 2 x 2 sequences" in text and "PeftModel.from_pretrained" in text
    for place in (config.model.path, str(config.run.output_dir), config.data.train[0].path):
        assert place not in text, "nothing of this machine's paths"


def test_a_licence_is_what_the_base_says_of_itself(tmp_path):
    assert licence_of(str(tmp_path)) is None and licence_of("nobody/nothing") is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(str(tmp_path)) is None


def hub_config(config_of, **more):
    told = {"push_to_hub": True, "hub_id": "me/student", "max_steps": 2, "save_steps": 0}
    return config_of(train=told | more, data={"eval": []})


def test_a_finished_model_goes_to_the_hub(config_of, hub):
    shown = quiet()
    config = hub_config(config_of)
    folder = train(config, console=shown).output_dir / "final"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()} and "README.md" in hub.files
    created = next(json.loads(body) for path, body, _ in hub.seen if path == "/api/repos/create")
    assert created["name"] == "student" and "private" in (
        created.get("visibility"),
        *(["private"] * bool(created.get("private"))),
    )
    assert all(sent == f"Bearer {TOKEN}" for _, _, sent in hub.seen)
    assert f"on the hub: {hub.url}/me/student" in shown.file.getvalue()
    assert TOKEN not in "".join(path.read_text(errors="ignore") for path in folder.parent.rglob("*") if path.is_file())


def test_a_hub_that_refuses_costs_no_run_and_is_tried_again(config_of, hub):
    hub.refuses = "/commit/"
    config = hub_config(config_of)
    with pytest.raises(HubError, match=r"the run is finished and its model whole .* hf upload me/student") as caught:
        train(config, console=quiet())
    assert caught.value.exit_code == 75 and TOKEN not in str(caught.value)
    folder = config.run.output_dir
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    assert (folder / "final" / "adapter_model.safetensors").is_file()
    hub.refuses = "nothing"
    shown = quiet()
    assert train(config, resume=True, console=shown).steps == 2
    assert "nothing to resume" in shown.file.getvalue() and "adapter_model.safetensors" in hub.files


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("offline", "HF_HUB_OFFLINE=1 forbids it"),
        ("no token", "there is no token: hf auth login, or set HF_TOKEN"),
        ("away", "the hub does not know us"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_step_0(config_of, hub, monkeypatch, what, told):
    from huggingface_hub import constants

    from student_trainer.training.tracking import hub as house

    if what == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif what == "no token":
        monkeypatch.setattr(house, "get_token", lambda: None)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    config = hub_config(config_of)
    with pytest.raises(ConfigError, match=f"train.push_to_hub to me/student: {told}"):
        train(config, console=quiet())
    assert not config.run.output_dir.exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"push_to_hub": True}, "needs hub_id"),
        ({"push_to_hub": True, "hub_id": "student"}, "must be owner/name"),
        ({"hub_id": "me/student"}, "push_to_hub=true alone"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config_of, settings, told):
    with pytest.raises(ConfigError, match=told):
        config_of(train=settings)
