"""A run that publishes its student: what is sent, whose labels it learns from, what it refuses, and how it goes on."""

import io
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.labels.lineage import REVISIONS_NAME, read_ledger
from student_trainer.model.load import load_student
from student_trainer.model.merged import MergedWriter, check_finite, check_mergeable, merged_state
from student_trainer.rollout.publication.publisher import Publisher
from student_trainer.training.on_policy.checks import check_rollouts
from student_trainer.training.run import train
from teacher_wire.core.errors import CapabilityError, ForbiddenError, MismatchError
from tests.published import published_beside
from tests.student_trainer.conftest import run_config

IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
TOP_K = {"transport": "top_k", "k": 12}


@pytest.fixture
def base(model_factory):
    return model_factory("llama", seed=5)  # not tied: its head can stay while adapters are trained


@pytest.fixture(autouse=True)
def default_dtype_of_the_process(monkeypatch):
    """The publisher's thread leaves it alone: the steps that go on meanwhile would see it."""
    there, setters = torch.set_default_dtype, []

    def set_default_dtype(dtype):
        setters.append(threading.current_thread().name)
        there(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", set_default_dtype)
    yield
    assert "publisher" not in setters


@pytest.fixture
def one_after_the_other(monkeypatch):
    """Steps of tests are faster than any publication: each waits for the one before."""
    publish = Publisher.publish

    def waiting(self, step):
        if self._thread is not None:
            self._thread.join()
        publish(self, step)

    monkeypatch.setattr(Publisher, "publish", waiting)


def config_of(folder, base, rows, server, publish=None, **sections):
    sections = {
        "on_policy": {"share": 0, "publish": {"every": 2, "teacher": "me", **(publish or {})}},
        "data": {"eval": []},
        "train": {"save_steps": 0},
        "feed": {"max_batches": 2},  # no further ahead than a window, so that labels move while the run lasts
        **sections,
    }
    tree = run_config(folder, base, rows, server.edge.address, **sections)
    tree["teacher"] = {"tenant": "trainer", "retry_s": 2.0, **tree["teacher"], **sections.get("teacher", {})}
    return parse_config(tree, "test")


def run(config, **options):
    said = io.StringIO()
    result = train(config, console=Console(file=said, width=400), **options)
    return result, said.getvalue()


def ledger_of(folder):
    entries = read_ledger(folder / "run" / REVISIONS_NAME)
    live = {entry["fingerprint"]: entry for entry in entries if "revision" in entry and "fingerprint" in entry}
    return entries, live, {entry["batch"]: entry["fingerprint"] for entry in entries if "batch" in entry}


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("lora", [None, {"rank": 4, "target_modules": ["q_proj", "v_proj"]}], ids=["whole", "adapters"])
def test_what_is_published_is_what_the_student_computes(model_factory, tmp_path, family, lora):
    folder = model_factory(family, seed=3)
    student = load_student(ModelConfig(path=str(folder), dtype="float32", lora=lora), 0)
    for name, parameter in student.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    weights = merged_state(student, dtype=student.exported)
    for parameter in student.model.parameters():
        parameter.data += 0.0 if not parameter.requires_grad else 1.0  # training goes on; the copy does not
    MergedWriter(student).write(weights, tmp_path / "out", student.exported)
    for name, parameter in student.model.named_parameters():
        parameter.data.copy_(before[name])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, student.causal_lm(IDS).logits, atol=3e-4, rtol=0)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_weights_trained_in_float32_travel_in_the_dtype_of_the_model(model_factory, tmp_path):
    student = load_student(ModelConfig(path=str(model_factory("qwen2")), dtype="bfloat16", lora=None), 0)
    MergedWriter(student).write(merged_state(student, dtype=student.exported), tmp_path, student.exported)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged_is_refused(model_factory):
    tied = ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora={"target_modules": ["lm_head"]})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        check_mergeable(load_student(tied, 0))
    student = load_student(ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora=None), 0)
    weights = merged_state(student, dtype=student.exported)
    weights["model.norm.weight"][0] = float("nan")
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        check_finite(weights)


# --------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "sections",
    [{"model": {"lora": None}, "labels": TOP_K}, {"model": {"lora": {"rank": 4, "dropout": 0.0}}, "labels": {"transport": "hidden"}}],
    ids=["whole", "adapters and hidden labels"],
)  # fmt: skip
def test_labels_are_of_the_revision_they_name(base, rows_file, tmp_path, one_after_the_other, sections):
    """Old weights are gone at once here: a request that named them is made again, and never mixed."""
    with published_beside(tmp_path, base) as server:
        result, said = run(config_of(tmp_path, base, rows_file, server, **sections))
        first = read_ledger(tmp_path / "run" / REVISIONS_NAME)[0]["origin"]
        assert result.steps == 6 and server.deployed and said.count("is live as revision") == 3, said
        _, live, used = ledger_of(tmp_path)
        assert [entry["step"] for entry in live.values()] == [2, 4, 6]
        assert [entry["revision"] for entry in live.values()] == server.deployed
        assert sorted(used) == list(range(12)) and set(used.values()) <= {first, *live}
        assert len(set(used.values())) > 1, "they moved along"
        final = tmp_path / "run" / "final"
        if sections["model"]["lora"] is None:
            newest = load_file(server.revisions.path(server.deployed[-1]) / "model.safetensors")
            for name, tensor in load_file(final / "model.safetensors").items():
                assert torch.equal(tensor, newest[name])
    assert not (tmp_path / "run" / ".publishing").exists()


def test_another_teacher_of_the_server_may_be_published(base, rows_file, tmp_path):
    """Then nothing moves: here the run learns from no teacher at all."""
    with published_beside(tmp_path, base) as server:
        config = config_of(
            tmp_path, base, rows_file, server, loss={"output": None, "sft_weight": 1.0}, publish={"every": 6}
        )
        _, said = run(config)
        assert "step 6 is live" in said and ledger_of(tmp_path)[2] == {}


@pytest.mark.parametrize("on_failure", ["skip", "stop"])
def test_a_revision_that_does_not_go_live(base, rows_file, tmp_path, one_after_the_other, on_failure):
    with published_beside(tmp_path, base) as server:
        server.refuses = True
        config = config_of(
            tmp_path, base, rows_file, server, {"on_failure": on_failure}, model={"lora": None}, labels=TOP_K
        )
        if on_failure == "stop":
            with pytest.raises(RunError, match="on_failure=stop: it cannot come up"):
                run(config)
        else:
            result, said = run(config)
            assert result.steps == 6
            for number in (1, 2, 3):
                assert f"step {2 * number} is not published ({number} so far): it cannot come up" in said
        _, live, used = ledger_of(tmp_path)
        assert live == {} and len(set(used.values())) == 1


def test_a_publication_that_is_still_under_way_is_said(base, rows_file, tmp_path):
    with published_beside(tmp_path, base) as server:
        server.idle = True

        def later():
            server.idle = False

        threading.Timer(3.0, later).start()
        _, said = run(config_of(tmp_path, base, rows_file, server, model={"lora": None}, labels=TOP_K))
        assert "step 4 is not published: the revision before is still on its way" in said
        assert "step 2 is live" in said


def test_what_cannot_be_published_is_refused_before_there_is_a_folder(base, model_factory, rows_file, tmp_path):
    whole = {"model": {"lora": None}, "labels": TOP_K}
    with published_beside(tmp_path, base) as server:
        cases = [
            (whole | {"teacher": {"tenant": "stranger"}}, ForbiddenError, "publish.tenants"),
            (whole | {"labels": {"transport": "hidden"}}, ConfigError, "labels.transport=hidden"),
            ({"model": {"lora": {"rank": 2, "target_modules": ["q_proj", "lm_head"]}}, "labels": {"transport": "hidden"}}, ConfigError, "head"),
            ({"model": {"lora": None, "path": str(model_factory("llama", seed=5, hidden=64))}, "labels": TOP_K}, MismatchError, "config_json.h"),
        ]  # fmt: skip
        for sections, kind, named in cases:
            with pytest.raises(kind) as caught:
                run(config_of(tmp_path, base, rows_file, server, **sections))
            assert named in str(caught.value)
            assert not (tmp_path / "run").exists() and server.deployed == [] and not server.incoming.exists()
        server.config = server.config.model_copy(update={"publish": None})
        server.news("")
        with pytest.raises(CapabilityError):
            run(config_of(tmp_path, base, rows_file, server, **whole))


@pytest.mark.parametrize("by", [{"transport": "full"}, {"transport": "hidden"}], ids=["full", "hidden"])
def test_held_out_rows_are_measured_with_the_teacher_of_the_moment(
    base, rows_file, tmp_path, one_after_the_other, monkeypatch, by
):
    from student_trainer.teachers import session

    sections = {
        "model": {"lora": None},
        "labels": TOP_K,
        "data": {"eval": [f"{rows_file}#6"]},
        "train": {"eval_steps": 2},
    }
    publish = Publisher.publish
    monkeypatch.setattr(Publisher, "publish", lambda self, step: (publish(self, step), self._thread.join()))
    with published_beside(tmp_path, base) as server:
        monkeypatch.setattr(session, "measured_by", lambda config, info, labels, *rest: labels.model_copy(update=by))
        result, said = run(config_of(tmp_path, base, rows_file, server, **sections))
    measured = [entry["eval_kl_to_teacher"] for entry in result.curve if "eval_kl_to_teacher" in entry]
    if by["transport"] == "hidden":
        assert "kl_to_teacher is not measured" in said and measured == []
    else:
        assert measured[-1] < 1e-5, "of the newest revision, which is the student itself"
    assert "nll_per_token" in result.metrics


def test_a_run_goes_on_with_its_own_revisions_and_with_no_others(
    base, rows_file, tmp_path, one_after_the_other, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self._publisher._thread.join()
            raise Killed

    from student_trainer.rollout.publication.publishing import PublishAfterSteps

    whole = {"model": {"lora": None}, "labels": TOP_K, "train": {"save_steps": 2}}
    with published_beside(tmp_path, base) as server:
        config = config_of(tmp_path, base, rows_file, server, **whole)
        with monkeypatch.context() as patched:
            patched.setattr(
                PublishAfterSteps, "on_step_begin", lambda self, *a, **k: killed(self, *a, **k), raising=False
            )
            with pytest.raises(Killed):
                run(config)
        entries, live, _ = ledger_of(tmp_path)
        assert len(server.deployed) == 2
        foreign = replace(server.teacher.teacher_info(), revision="f" * 64, fingerprint="e" * 64)
        with monkeypatch.context() as patched:
            patched.setattr(type(server.teacher._engine), "info", property(lambda self: foreign), raising=False)
            with pytest.raises(RunError, match="another teacher"):
                run(config, resume=True)
        result, said = run(config, resume=True)
        assert result.steps == 6 and "resuming at step 4" in said
        again, live_after, used = ledger_of(tmp_path)
        assert again[0] == entries[0] and set(live) < set(live_after)
        assert sorted(used) == list(range(12)), "labels of steps made again are entered once more"


def test_a_run_that_never_publishes_says_so():
    config = parse_config(
        {"model": {"path": "m"}, "data": {"train": ["r"]}, "teacher": {"address": "a:1"}, "run": {"output_dir": "o"},
         "on_policy": {"share": 0, "publish": {"every": 7, "teacher": "me"}}}, "test",
    )  # fmt: skip
    for steps, told in ((6, True), (7, False)):
        order = SimpleNamespace(batch_size=1, accumulation=1, steps=steps)
        found = [one for one in check_rollouts(config, None, [], order, []) if one.setting == "on_policy.publish.every"]
        assert bool(found) == told and all("nothing is published" in one.fix for one in found)
