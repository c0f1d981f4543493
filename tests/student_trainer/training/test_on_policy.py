"""On-policy runs against a teacher behind the real wire: what is learned from at which step, and that nothing else changes."""

import io
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError, RolloutError, RunError
from student_trainer.rollout.engines.hf_sampler import HfSampler
from student_trainer.rollout.sample import RolloutFailure
from student_trainer.training.on_policy.named import NamedAhead
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import run_config
from tests.student_trainer.training.test_train import QUIET, adapter_hash, losses

ALL = {"share": 1.0, "max_new_tokens": 6, "max_staleness": 0}
HALF = {"share": {"start": 0.0, "end": 1.0, "warmup": 0.2, "ramp": 0.5}, "max_new_tokens": 6}


@pytest.fixture
def go(tmp_path, model_factory, rows_file, fake, monkeypatch):
    """name, sections -> the folder of a run, and the names of the samples that each micro-batch has learned from."""
    seen = []
    plain = DistillationTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        batch = inputs["batch"]
        seen.append(batch)
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    with serve(fake) as server:

        def run(name, *, resume=False, console=QUIET, **sections):
            where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
            sections = {"data": {"eval": []}, "model": {"compiled": False}} | sections
            tree = run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, run=where, **sections)
            seen.clear()
            return train(parse_config(tree, "test"), resume=resume, console=console).output_dir, list(seen)

        run.server = server
        yield run


def ledger(folder):
    path = folder / "rollouts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def names(seen):
    return [name for batch in seen for name in batch.request.names]


def take_back(folder, *steps):
    """Makes a finished run one that was interrupted after an earlier checkpoint."""
    for name in ("final", *(f"checkpoint-{step}" for step in steps)):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()


def test_a_share_of_nothing_is_off_policy_training_bit_by_bit(go):
    off, plain = go("off")
    none, seen = go("none", on_policy={"share": 0.0})
    late, some = go(
        "late", on_policy={"share": {"start": 0, "end": 1, "warmup": 0.5, "ramp": 0.0}, "max_new_tokens": 5}
    )
    assert losses(off) == losses(none) and adapter_hash(off) == adapter_hash(none) and names(plain) == names(seen)
    assert not (none / "rollouts.jsonl").exists()
    strip = [{k: v for k, v in entry.items() if k in losses(off)[0]} for entry in losses(late)]
    assert strip[:3] == losses(off)[:3] and strip[3:6] != losses(off)[3:6]
    assert names(some)[:12] == names(plain)[:12]


def test_a_share_of_all_learns_from_rollouts_alone(go):
    folder, seen = go("all", on_policy=ALL)
    assert all("[rollout " in name for name in names(seen)) and len(names(seen)) == 24
    entries = ledger(folder)
    assert [(e["step"], e["slot"]) for e in entries] == [(step, slot) for step in range(6) for slot in range(4)]
    assert all(e["version"] == e["step"] for e in entries) and all(1 <= e["tokens"] <= 6 for e in entries)
    log = [e for e in losses(folder) if "loss" in e]
    assert all(e["on_policy_share"] == 1 and e["staleness"] == 0 and np.isfinite(e["loss"]) for e in log)
    assert all(0 <= e["teacher_agreement"] <= 1 and e["teacher_entropy"] > 0 for e in log)
    for batch in seen:
        assert batch.sampled_logp_N.shape == batch.labels_N.shape and not batch.sampled_logp_N.isnan().any()
        assert (batch.weights_N == 0).sum() == sum(not e["finished"] for e in entries[:2])  # checked in full below
        entries = entries[2:]


def test_what_is_learned_from_is_what_the_student_would_write(go, model_factory):
    """The log-probabilities of step 0, under the untrained student called directly, over prompts of the rows."""
    from student_trainer.config.model import ModelConfig
    from student_trainer.model.load import load_student

    _, seen = go("first", on_policy=ALL, train={"max_steps": 1, "log_steps": 1, "save_steps": 0})
    settings = ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora={"rank": 4}, compiled=False)
    student = load_student(settings, seed=0)
    student.model.eval()
    for batch in seen:
        with torch.no_grad():
            logp_BLV = student.model(input_ids=batch.input_ids_BL).logits.log_softmax(-1)
        wanted = logp_BLV.flatten(0, 1)[batch.index_N].gather(-1, batch.labels_N[:, None])[:, 0]
        np.testing.assert_allclose(batch.sampled_logp_N, wanted, atol=1e-4)


@pytest.mark.parametrize("staleness", [1, 2])
def test_weights_are_as_old_as_the_plan_says(go, staleness):
    folder, _ = go("old", on_policy=ALL | {"max_staleness": staleness})
    assert [e["version"] for e in ledger(folder)[::4]] == [max(0, step - staleness) for step in range(6)]
    log = [e for e in losses(folder) if "loss" in e]
    assert [e["staleness"] for e in log] == [min(step, staleness) for step in range(6)]


@pytest.mark.parametrize(("staleness", "kept"), [(0, 2), (1, 4), (2, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(go, staleness, kept):
    settings = {"on_policy": HALF | {"max_staleness": staleness}, "train": {"keep_checkpoints": 9}}
    straight, seen = go("straight", **settings)
    broken = shutil.copytree(straight, straight.parent / "broken")
    take_back(broken, *(step for step in (2, 4, 6) if step > kept))
    _, again = go("broken", resume=True, **settings)
    assert names(again) == names(seen)[4 * kept :]
    assert [b.input_ids_BL.tolist() for b in again] == [b.input_ids_BL.tolist() for b in seen[2 * kept :]]
    assert ledger(broken) == ledger(straight) and losses(broken) == losses(straight)
    assert adapter_hash(broken) == adapter_hash(straight)


def test_a_resumed_run_may_write_another_number_at_a_time(go):
    """It decides how fast, not what; and a run of a version that had another default, and no GPU to choose, goes on."""
    straight, seen = go("straight", on_policy=HALF, train={"keep_checkpoints": 9})
    broken = shutil.copytree(straight, straight.parent / "broken")
    take_back(broken, 4, 6)
    identity = json.loads((broken / "run.json").read_text())
    assert not {"on_policy.batch", "on_policy.device"} & identity["settings"].keys()
    identity["settings"]["on_policy.batch"] = 32
    (broken / "run.json").write_text(json.dumps(identity))
    _, again = go("broken", resume=True, on_policy=HALF | {"batch": 3}, train={"keep_checkpoints": 9})
    assert names(again) == names(seen)[8:] and ledger(broken) == ledger(straight)
    assert adapter_hash(broken) == adapter_hash(straight)


def test_how_a_window_is_cut_changes_no_coin(go):
    found = {}
    for size, accumulation in ((1, 8), (2, 4), (4, 2)):
        cut = {"batch_size": size, "accumulation": accumulation, "max_steps": 2, "save_steps": 0}
        folder, seen = go(f"cut-{size}", train=cut, on_policy=ALL | {"share": 0.5})
        found[size] = [(e["step"], e["slot"], e["key"]) for e in ledger(folder)], names(seen)
    assert len({str(value) for value in found.values()}) == 1 and found[1][0]


def test_the_share_follows_its_schedule_by_the_ledger(go):
    from student_trainer.config.on_policy import OnPolicyConfig
    from student_trainer.rollout.plan import RolloutPlan

    folder, seen = go("share", on_policy=HALF)
    plan = RolloutPlan(OnPolicyConfig(**HALF), seed=0, steps=6, window=4)
    assert [(e["step"], e["slot"]) for e in ledger(folder)] == [(s, p.slot) for s in range(6) for p in plan.places(s)]
    log = [e for e in losses(folder) if "loss" in e]
    assert [e["on_policy_share"] for e in log] == [len(plan.places(step)) / 4 for step in range(6)]
    assert ["[rollout " in name for name in names(seen)] == [
        slot in {p.slot for p in plan.places(s)} for s in range(6) for slot in range(4)
    ]
    assert "teacher_agreement" not in log[0] and "staleness" not in log[0] and "teacher_agreement" in log[-1]


def test_samples_of_one_prompt_share_it(go):
    folder, _ = go("groups", on_policy=ALL | {"samples_per_prompt": 2})
    keys = [e["key"] for e in ledger(folder)]
    assert keys[::2] == keys[1::2] and len(set(keys)) == 12


def test_labels_of_rollouts_are_not_kept_and_those_of_rows_are(go, tmp_path):
    folder, _ = go("kept", on_policy=HALF)
    rows = 24 - len(ledger(folder))
    kept = len(list((tmp_path / "cache" / "labels").rglob("*.safetensors")))
    assert rows <= kept <= rows + 1 < 20  # and the one that the door was tried with


@pytest.mark.parametrize("transport", ["top_k", "full"])
def test_other_labels_tell_of_health_too(go, transport):
    short = {"max_steps": 2, "save_steps": 0}
    folder, _ = go(
        transport,
        on_policy=ALL,
        labels={"transport": transport} | ({"k": 20} if transport == "top_k" else {}),
        train=short,
    )
    log = [e for e in losses(folder) if "loss" in e]
    assert all(0 <= e["topk_overlap"] <= 1 and 0 < e["teacher_entropy"] < np.log(300) + 1e-6 for e in log)


def test_a_teacher_that_is_told_more_reads_another_prompt_before_the_same_completion(go, rows_file, tmp_path):
    rows = [
        json.loads(line) | {"hint": f"the old dog {n}"} for n, line in enumerate(rows_file.read_text().splitlines())
    ]
    file = tmp_path / "hinted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"address": go.server.address, "context": {"field": "hint"}}
    data = {"train": [str(file)], "eval": []}
    folder, seen = go("told", on_policy=HALF, teacher=teacher, data=data)
    assert ledger(folder)
    for batch in seen:
        asked = batch.request.batch
        assert asked.tokens > int((batch.input_ids_BL != 0).sum())  # right-padded with id 0
        assert asked.labels_N().tolist() == batch.labels_N.tolist()
    plain, other = go("plain", on_policy=HALF, data=data)
    assert [e["kd_loss"] for e in losses(plain) if "loss" in e] != [e["kd_loss"] for e in losses(folder) if "loss" in e]
    assert [b.input_ids_BL.tolist() for b in other][:4] == [b.input_ids_BL.tolist() for b in seen][:4]


def test_the_students_own_ids_are_those_of_sampling(go, monkeypatch):
    from student_trainer.training.learner import Learner

    passes, asked = [], NamedAhead.request
    plain = Learner._likeliest_ids
    monkeypatch.setattr(
        Learner, "_likeliest_ids", lambda self, ids, *a: passes.append(len(ids)) or plain(self, ids, *a)
    )
    labels = {"transport": "top_k", "k": 8, "extra_ids": 4}
    ahead = []
    monkeypatch.setattr(NamedAhead, "request", lambda self, number: ahead.append(number) or asked(self, number))
    go("named", on_policy=ALL, labels=labels, train={"max_steps": 2, "save_steps": 0})
    assert not passes and ahead == [0, 1, 2, 3]
    folder, seen = go("mixed", on_policy=HALF, labels=labels)
    assert sum(passes) == 24 - len(ledger(folder))
    for batch in seen:
        assert (
            batch.likeliest_NM is None
            or ((batch.likeliest_NM < 0).all(-1) == batch.sampled_logp_N.isnan().numpy()).all()
        )


def test_a_prompt_without_a_completion_is_named_skipped_and_counted(go, monkeypatch):
    plain = HfSampler.sample

    def failing(self, prompts):
        return [
            RolloutFailure(one.prompt, "the weather is bad") if (one.prompt.step, one.prompt.slot) == (1, 2) else one
            for one in plain(self, prompts)
        ]

    monkeypatch.setattr(HfSampler, "sample", failing)
    shown = Console(file=io.StringIO(), width=300)
    folder, seen = go("skipped", on_policy=ALL, console=shown)
    (skipped,) = [e for e in ledger(folder) if "skipped" in e]
    assert (skipped["step"], skipped["slot"], skipped["skipped"]) == (1, 2, "the weather is bad")
    assert names(seen)[6] == skipped["key"] and sum("[rollout" in name for name in names(seen)) == 23
    log = [e for e in losses(folder) if "loss" in e]
    assert [e.get("rollout_failures") for e in log] == [None, 1, None, None, None, None]
    assert log[1]["on_policy_share"] == 0.75
    assert f"{skipped['key']} (step 1, place 2) got no completion: the weather is bad" in shown.file.getvalue()
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"got no completion: the weather is bad .on_policy.on_failure=stop"):
        go("stopped", on_policy=ALL | {"on_failure": "stop"})


def test_a_failure_is_pending_like_any_rollout(go, monkeypatch):
    plain = HfSampler.sample

    def failing(self, prompts):
        return [
            RolloutFailure(p, "no") if p.slot == 1 else one
            for p, one in zip(prompts, plain(self, prompts), strict=True)
        ]

    monkeypatch.setattr(HfSampler, "sample", failing)
    settings = {"on_policy": ALL | {"max_staleness": 1}, "train": {"keep_checkpoints": 9, "max_steps": 4}}
    folder, _ = go("pending", **settings)
    before = ledger(folder), losses(folder)
    take_back(folder, 4)
    go("pending", resume=True, **settings)
    assert (ledger(folder), losses(folder)) == before


def test_an_engine_that_is_gone_ends_the_run_with_its_word(go, monkeypatch, tmp_path):
    def gone(self, prompts):
        raise RolloutError("on_policy.engine=hf: the machine is on fire")

    monkeypatch.setattr(HfSampler, "sample", gone)
    with pytest.raises(RolloutError, match="on fire"):
        go("gone", on_policy=ALL)
    assert not (tmp_path / "gone").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_a_run_that_fails_leaves_no_thread_behind(go, monkeypatch):
    """With a feed that waits for rollouts of steps that will not come."""
    plain = DistillationTrainer._get_grad_norm

    def failing(self, *args, **kwargs):
        return 1 / 0 if self.state.global_step == 1 else plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "_get_grad_norm", failing)
    with pytest.raises(ZeroDivisionError):
        go("failed", on_policy=ALL)
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_a_run_that_is_refused_after_its_engine_is_there_ends_the_engine(go, monkeypatch):
    """The engine may be a process, and another run may have taken the folder while it started."""
    from student_trainer.training import run as door

    closed, asked = [], []
    monkeypatch.setattr(HfSampler, "close", lambda self: closed.append(self))

    def taken_meanwhile(config, resume):
        asked.append(config)
        if len(asked) == 2:
            raise RunError("taken meanwhile")
        return iter(())

    monkeypatch.setattr(door, "check_folder", taken_meanwhile)
    with pytest.raises(RunError, match="taken meanwhile"):
        go("refused", on_policy=ALL)
    assert closed


def test_a_teacher_that_dies_during_rollouts_is_waited_for_and_nothing_is_lost(go, monkeypatch):
    settings = {"on_policy": HALF, "teacher": {"address": go.server.address, "wait_s": 60}}
    straight, _ = go("straight", **settings)
    plain = HfSampler.sample

    def killed(self, prompts):
        written = plain(self, prompts)
        if prompts and prompts[0].step == 3:
            go.server.stop()
            threading.Timer(1.0, go.server.start).start()
            time.sleep(0.2)
        return written

    monkeypatch.setattr(HfSampler, "sample", killed)
    killed_run, _ = go("killed", **settings)
    assert losses(killed_run) == losses(straight) and ledger(killed_run) == ledger(straight)


def test_a_damaged_checkpoint_of_rollouts_is_named(go):
    settings = {"on_policy": ALL | {"max_staleness": 1}, "train": {"max_steps": 4}}
    folder, _ = go("damaged", **settings)
    take_back(folder, 4)
    file = folder / "checkpoint-2" / "rollouts.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'\\"tokens\\": ', b'\\"tokenz\\": '))
    with pytest.raises(RunError, match=r"checkpoint-2/rollouts.safetensors cannot be read"):
        go("damaged", resume=True, **settings)
    assert (folder / "checkpoint-2").is_dir()


def test_garbage_is_warned_of_once(go):
    shown = Console(file=io.StringIO(), width=400)
    go(
        "garbage", on_policy=ALL, console=shown, train={"max_steps": 3, "save_steps": 0}
    )  # a random student and a random teacher
    assert shown.file.getvalue().count("the teacher is asked about sequences that are far from its own") == 1


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"teacher": None, "loss": {"output": None, "sft_weight": 1.0}}, "on_policy: .* set the section teacher"),
        (
            {"on_policy": {"share": 1.0, "max_new_tokens": 200}},
            "on_policy.max_new_tokens=200 are more than the 128 tokens that the student",
        ),
        (
            {"on_policy": {"share": 1.0, "engine": "vllm", "temperature": 0.5, "top_p": 0.9}},
            "temperature=0.5 and top_p=0.9 with engine=vllm: vLLM tells",
        ),
        ({"on_policy": {"share": 1.0, "device": 1}}, "device=1 is for engine=vllm; engine=hf writes where"),
        ({"on_policy": {"share": 1.0, "batch": "all"}}, "on_policy.batch"),
        (
            {"on_policy": {"share": 1.0, "engine": "vllm", "device": 64}},
            "on_policy.device=64: this process sees .*GPU",
        ),
        ({"on_policy": {"share": 1.5}}, "on_policy.share"),
        ({"on_policy": {"share": {"warmup": 0.8, "ramp": 0.3}}}, "warmup=0.8 and ramp=0.3 are more than the run"),
        ({"on_policy": {"max_new_tokens": 1}}, "on_policy.max_new_tokens"),
        ({"on_policy": {"sync_steps": 4, "max_staleness": 2}}, "sync_steps=4 makes rollouts older"),
    ],
)
def test_what_cannot_be_is_refused_by_name(go, sections, wanted, tmp_path):
    with pytest.raises(ConfigError, match=wanted):
        go("refused", **{"on_policy": ALL} | sections)
    assert not (tmp_path / "refused").exists()


def test_rows_too_long_to_be_answered_are_learned_from_as_they_are_or_refused(go, model_factory):
    """Positions for 48 tokens, prompts of 15 to 20: a completion of 30 fits behind some of them alone."""
    model = {"path": str(model_factory("qwen2", max_position_embeddings=48)), "compiled": False}
    shown = Console(file=io.StringIO(), width=400)
    most = ALL | {"max_new_tokens": 30}
    folder, seen = go("some", on_policy=most, console=shown, model=model, train={"max_steps": 4, "save_steps": 0})
    told = " ".join(shown.file.getvalue().split())
    assert "of the 48 rows cannot be answered" in told and "the rows are learned from as they are" in told
    skipped = [e for e in ledger(folder) if "skipped" in e]
    assert 0 < len(skipped) < 16 and all(
        "max_new_tokens=30 are more than the 48 tokens" in e["skipped"] for e in skipped
    )
    assert [name for name in names(seen) if "[rollout" not in name] == [e["key"] for e in skipped]
    with pytest.raises(ConfigError, match=r"of the 48 rows cannot be answered.*set on_policy.on_failure=skip"):
        go("stopped", on_policy=most | {"on_failure": "stop"}, model=model)


def test_requests_of_rollouts_are_held_against_the_teachers_limits(go, fake):
    fake.max_reply_bytes = 6_000  # rows of 24 numbers: what the data's answers take, not what 60 tokens do
    with pytest.raises(ConfigError, match=r"on_policy.max_new_tokens makes a request of .* reply bytes"):
        go("large", on_policy=ALL | {"max_new_tokens": 60}, train={"batch_size": 4, "accumulation": 1})
