"""Whole runs against a teacher behind the real wire: right losses, resumption, refusals, nothing half-written."""

import hashlib
import io
import itertools
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import parse_source
from student_trainer.errors import ConfigError, RunError
from student_trainer.labels.packing import pack
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.model.load import load_student
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.metrics import TIMED
from student_trainer.training.run import train
from student_trainer.training.trainer import learning_rate_share
from teacher_wire.core.errors import LabelError, MismatchError
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.thorough import covering

QUIET = Console(file=io.StringIO())


def losses(folder):
    """Everything in the log that the clock does not decide."""
    entries = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMED and not k.startswith("train_")} for e in entries]


def adapter_hash(folder):
    return hashlib.sha256((folder / "final" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("labels", "lora"),
    covering(
        [("hidden", "forward_kl"), ("top_k", "jsd"), ("full", "reverse_kl")],
        [None, {"rank": 4}, {"rank": 4, "target_modules": ["q_proj", "lm_head"]}],
    ),
)
def test_a_run_learns_and_leaves_a_model(config_of, labels, lora):
    transport, divergence = labels
    model = {"lora": lora}
    config = config_of(
        model=model,
        labels={"transport": transport} | ({"k": 20} if transport == "top_k" else {}),
        loss={"output": {"divergence": divergence}, "sft_weight": 0.1},
        train={"max_steps": 12, "eval_steps": 6, "learning_rate": 5e-3},
    )
    result = train(config, console=QUIET)
    logged = [e for e in result.curve if "loss" in e]
    assert logged[-1]["kd_loss"] < logged[0]["kd_loss"]
    assert logged[0]["loss"] == pytest.approx(logged[0]["kd_loss"] + 0.1 * logged[0]["sft_loss"], rel=1e-5)
    assert result.metrics["kl_to_teacher"] > 0 and 0 <= result.metrics["acc1"] <= result.metrics["acc3"] <= 1
    assert [e["step"] for e in result.curve if "eval_nll_per_byte" in e] == [6, 12]
    names = {path.name for path in (result.output_dir / "final").iterdir()}
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in names
    assert not list(result.output_dir.rglob("*.bin")) + list(result.output_dir.rglob("*.pt*")), "no pickle anywhere"


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (
            {"transport": "hidden", "compression": "int8"},
            {"divergence": "jsd", "temperature": {"kind": "linear", "start": 4.0, "end": 1.0, "steps": 10}},
        ),
        ({"transport": "top_k", "k": 12, "extra_ids": 6}, {"divergence": "reverse_kl"}),
        ({"transport": "auto"}, {"divergence": "forward_kl", "temperature": 2.0, "tau_squared": True}),
        ({"transport": "top_k", "k": 12}, {"divergence": "forward_kl", "temperature": 2.0, "tempered_head": True}),
    ],
    ids=["int8", "extra_ids", "auto", "tempered_head"],
)
def test_every_way_of_labels_trains(config_of, labels, loss):
    shown = Console(file=io.StringIO(), width=200)
    result = train(
        config_of(labels=labels, loss={"output": loss}, train={"max_steps": 12, "learning_rate": 5e-3}), console=shown
    )
    logged = [e for e in result.curve if "loss" in e]
    assert logged[-1]["sft_loss"] < logged[0]["sft_loss"] + 0.5 and np.isfinite([e["loss"] for e in logged]).all()
    assert result.metrics["kl_to_teacher"] < 8
    if labels["transport"] == "auto":
        assert "labels by" in shown.file.getvalue() and "head takes" in shown.file.getvalue()


def test_int8_states_train_almost_as_the_exact_ones(config_of, tmp_path):
    runs = []
    for compression in ("none", "int8"):
        config = config_of(
            run={"output_dir": str(tmp_path / compression), "cache_dir": str(tmp_path / "cache")},
            labels={"transport": "hidden", "compression": compression},
            train={"max_steps": 1},
        )
        runs.append(train(config, console=QUIET).curve[0]["loss"])
    assert runs[0] != runs[1]
    assert runs[1] == pytest.approx(runs[0], rel=0.01)


def test_a_resumed_run_with_named_ids_is_the_uninterrupted_one(config_of, tmp_path):
    """The ids depend on the student's weights: they must come out the same after resumption."""
    sections = {
        "labels": {"transport": "top_k", "k": 8, "extra_ids": 4},
        "loss": {"output": {"divergence": "reverse_kl"}},
    }
    folders = [tmp_path / name for name in ("straight", "broken")]
    configs = [
        config_of(run={"output_dir": str(folder), "cache_dir": str(tmp_path / "cache")}, **sections)
        for folder in folders
    ]
    train(configs[0], console=QUIET)
    train(configs[1], console=QUIET)
    import shutil

    shutil.rmtree(folders[1] / "checkpoint-6")
    shutil.rmtree(folders[1] / "final")
    (folders[1] / "result.json").unlink()
    train(configs[1], resume=True, console=QUIET)
    assert adapter_hash(folders[0]) == adapter_hash(folders[1])
    assert losses(folders[0]) == losses(folders[1])


def test_the_first_loss_is_the_divergence_of_student_and_teacher(config_of, fake):
    """The logged figure against both models asked directly, without feed, wire or chunked loss."""
    config = config_of(train={"max_steps": 1}, model={"lora": None}, loss={"sft_weight": 0.0})
    result = train(config, console=QUIET)
    student = load_student(config.model, config.run.seed)
    data = build_dataset([parse_source(str(config.data.train[0].path))], student.tokenizer, max_tokens=100)
    order = RunOrder(len(data), batch_size=2, accumulation=2, epochs=1, max_steps=1, seed=config.run.seed)
    total, rows = 0.0, 0
    vocab = len(student.tokenizer)
    for index in [i for number in range(2) for i in order.batch(number)]:
        packed = pack([data[index].example]).batch
        teacher = (
            torch.from_numpy(fake.signals(spec_of("full", vocab), packed)["logits_NV"].array).double().log_softmax(-1)
        )
        with torch.no_grad():
            logits = student.model(torch.from_numpy(packed.token_ids_T).long()[None]).logits[
                0, packed.rows_of(), :vocab
            ]
        total += float((teacher.exp() * (teacher - logits.double().log_softmax(-1))).sum())
        rows += packed.rows
    assert result.curve[0]["loss"] == pytest.approx(total / rows, rel=1e-4)


def test_accumulation_changes_nothing_but_memory(config_of, tmp_path):
    """One window of 4 sequences, cut 1x4, 2x2 or 4x1, of different lengths: the same step."""
    logs = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = config_of(
            run={"output_dir": str(tmp_path / f"run{batch_size}"), "cache_dir": str(tmp_path / "cache")},
            model={"lora": None},
            train={"max_steps": 3, "batch_size": batch_size, "accumulation": accumulation},
        )
        logs.append([e for e in train(config, console=QUIET).curve if "loss" in e])
    for log in logs[1:]:  # the norm tells what Adam would hide: it divides by the gradient's own scale
        for name in ("loss", "grad_norm", "kd_loss", "sft_loss"):
            assert [e[name] for e in log] == pytest.approx([e[name] for e in logs[0]], rel=1e-4), name


class _Stop(Exception):
    """Stands for a kill between two steps."""


@pytest.mark.parametrize("killed_at", [1, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one(config_of, tmp_path, fake, monkeypatch, killed_at):
    """With adapter dropout, against bit-equal labels: same weights, same log."""
    sections = {
        "train": {"max_steps": 8, "save_steps": 2, "log_steps": 1, "eval_steps": 4, "batch_size": 2, "accumulation": 2}
    }
    straight = config_of(
        run={"output_dir": str(tmp_path / "straight"), "cache_dir": str(tmp_path / "cache")}, **sections
    )
    broken = config_of(run={"output_dir": str(tmp_path / "broken"), "cache_dir": str(tmp_path / "cache")}, **sections)
    train(straight, console=QUIET)
    from student_trainer.training.trainer import DistillationTrainer

    original = DistillationTrainer.compute_loss

    def dying(self, *args, **kwargs):
        if self.state.global_step == killed_at:
            raise _Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", dying)
    with pytest.raises(_Stop):
        train(broken, console=QUIET)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", original)
    half = tmp_path / "broken" / ".unfinished" / "checkpoint-99"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("torn")
    train(broken, resume=True, console=QUIET)
    assert not half.parent.exists(), "what was not finished is no checkpoint"
    assert adapter_hash(tmp_path / "broken") == adapter_hash(tmp_path / "straight")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_resuming_a_finished_run_changes_nothing(config_of):
    config = config_of()
    first = train(config, console=QUIET)
    before = adapter_hash(first.output_dir)
    train(config, resume=True, console=QUIET)
    assert adapter_hash(first.output_dir) == before


def test_a_second_run_does_not_overwrite_the_first(config_of):
    config = config_of()
    train(config, console=QUIET)
    with pytest.raises(ConfigError, match=r"run\.output_dir.*--resume"):
        train(config, console=QUIET)


def test_a_run_is_not_resumed_with_other_settings_or_another_teacher(config_of, model_factory, tmp_path, rows_file):
    train(config_of(), console=QUIET)
    with pytest.raises(RunError, match=r"train\.learning_rate: 0\.01 -> 0\.5"):
        train(
            config_of(train={"max_steps": 6, "learning_rate": 0.5, "batch_size": 2, "accumulation": 2, "log_steps": 1}),
            resume=True,
            console=QUIET,
        )
    with serve(fake_for(model_factory("qwen2"), seed=7)) as other:
        config = config_of(teacher={"address": other.address})
        with pytest.raises(RunError, match="another teacher"):
            train(config, resume=True, console=QUIET)


def test_a_run_is_not_resumed_on_other_rows_or_from_other_weights(tmp_path, model_factory, server):
    import shutil

    from student_trainer.config.run import parse_config

    rows = tmp_path / "rows.jsonl"
    model = shutil.copytree(model_factory("qwen2"), tmp_path / "model")

    def write(word):
        rows.write_text("".join(json.dumps({"instruction": "Go.", "output": f"{word} {i}"}) + "\n" for i in range(12)))

    write("cat")
    config = parse_config(run_config(tmp_path, model, rows, server.address), "test")
    train(config, console=QUIET)
    (config.run.output_dir / "result.json").unlink()
    write("dog")
    with pytest.raises(RunError, match="rows have changed"):
        train(config, resume=True, console=QUIET)
    write("cat")
    shutil.copytree(model_factory("qwen2", seed=3), model, dirs_exist_ok=True)
    with pytest.raises(RunError, match="weights have changed"):
        train(config, resume=True, console=QUIET)


def test_auto_keeps_to_its_choice_over_a_resumption(config_of, monkeypatch):
    """The link is measured anew; a run must not change its labels for it."""
    from student_trainer.config.teachers import LabelConfig
    from student_trainer.teachers import trial

    config = config_of(labels={"transport": "auto"})
    chosen = LabelConfig(transport="hidden", compression="int8")
    monkeypatch.setattr(trial, "choose", lambda *args, **kwargs: (chosen, "slow today"))
    train(config, console=QUIET)
    (config.run.output_dir / "result.json").unlink()
    monkeypatch.setattr(trial, "choose", lambda *args, **kwargs: pytest.fail("it has been chosen"))
    train(config, resume=True, console=QUIET)


def test_the_last_checkpoints_are_kept_and_only_whole_ones(config_of):
    config = config_of(train={"max_steps": 6, "save_steps": 1, "keep_checkpoints": 2})
    folder = train(config, console=QUIET).output_dir
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert all((path / "COMPLETE").is_file() for path in folder.glob("checkpoint-*"))


def test_a_request_that_some_step_would_be_refused_is_refused_at_once(config_of, fake):
    for sections, named in [
        (
            {"feed": {"window_mb": 1}, "labels": {"transport": "full"}, "train": {"batch_size": 200}},
            r"train\.batch_size.*feed\.window_mb",
        ),
        ({"train": {"batch_size": 300}}, r"train\.batch_size.*300 sequences"),
    ]:
        config = config_of(**sections)
        with pytest.raises(ConfigError, match=named):
            train(config, console=QUIET)
        assert not config.run.output_dir.exists()


def test_a_model_is_kept_even_if_its_last_evaluation_fails(config_of, fake, monkeypatch):
    from student_trainer.training.trainer import DistillationTrainer

    def fails(self):
        raise LabelError("the teacher went mad")

    monkeypatch.setattr(DistillationTrainer, "last_metrics", fails)
    config = config_of()
    with pytest.raises(LabelError):
        train(config, console=QUIET)
    assert (config.run.output_dir / "final" / "adapter_model.safetensors").is_file()


def test_where_and_how_fast_may_change_on_resumption(config_of):
    train(config_of(), console=QUIET)
    config = config_of(feed={"max_mb": 1}, teacher={"address": config_of().teacher.address, "retry_s": 5})
    train(config, resume=True, console=QUIET)


@pytest.mark.parametrize(
    ("before", "told"),
    [("CPU", False), ("NVIDIA H100, compiled layers, recorded passes", True), (None, False)],
    ids=["here", "elsewhere", "by an earlier version"],
)
def test_other_kernels_are_told_of_on_resumption(config_of, before, told):
    config = config_of(model={"lora": {"rank": 4}})
    train(config, console=QUIET)
    (config.run.output_dir / "result.json").unlink()  # as if it had been killed at its end
    identity_file = config.run.output_dir / "run.json"
    identity = json.loads(identity_file.read_text())
    assert identity["computed"] == "CPU"
    if before is None:
        del identity["computed"]
        identity["settings"] |= {"model.compiled": False}
    else:
        identity["computed"] = before
    identity_file.write_text(json.dumps(identity))
    output = io.StringIO()
    train(config_of(model={"lora": {"rank": 4}, "graphs": False}), resume=True, console=Console(file=output, width=300))
    assert ("the same but for rounding" in output.getvalue()) == told
    assert not told or f"until here by {before}, from here by CPU" in output.getvalue()


@pytest.mark.parametrize(
    ("mistake", "transport"),
    [("shifted", "full"), ("nan", "hidden"), ("foreign", "hidden"), ("state", "hidden"), ("shifted", "hidden")],
)
def test_labels_that_lie_stop_the_run_before_a_step(config_of, fake, mistake, transport):
    """`hidden` labels give nothing away until the head is applied: the loss itself must notice."""
    config = config_of(labels={"transport": transport}, data={"train": config_of().data.train, "max_tokens": 100})
    fake.mistake = mistake
    with pytest.raises(LabelError):
        train(config, console=QUIET)
    assert not (config.run.output_dir / "train_log.jsonl").exists()
    assert checkpoint.newest_whole(config.run.output_dir) is None


@pytest.mark.parametrize("mistake", ["state", "shifted"])
def test_held_out_labels_that_lie_are_refused_as_those_of_training_are(config_of, tmp_path, fake, mistake):
    """Nothing but the head tells: without the check the figures would be measured against them."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"instruction": f"Say {i}.", "output": f"dog {i}"}) + "\n" for i in range(6))
    )
    sections = {
        "data": {"train": config_of().data.train, "eval": [str(held_out)], "max_tokens": 100},
        "loss": {"output": None, "sft_weight": 1.0},  # the teacher only measures
        "train": {"max_steps": 2, "eval_steps": 1},
    }
    config = config_of(**sections)
    fake.mistake = mistake
    with pytest.raises(TeacherHeadMismatch) as refused:
        train(config, console=QUIET)
    notes = " ".join(refused.value.__notes__)
    assert f"held-out sample {held_out}:" in notes and "were deleted from" in notes
    log = config.run.output_dir / "train_log.jsonl"
    assert not log.exists() or "eval_" not in log.read_text()
    fake.mistake = ""
    fresh = config_of(run={"output_dir": str(tmp_path / "again"), "cache_dir": str(tmp_path / "cache")}, **sections)
    assert train(fresh, console=QUIET).metrics["kl_to_teacher"] > 0, "the bad labels are not there any more"


def test_figures_per_byte_are_left_out_where_nothing_has_bytes(config_of, monkeypatch):
    from student_trainer.data.dataset import TokenizedDataset

    monkeypatch.setattr(TokenizedDataset, "target_bytes", property(lambda self: 0))
    metrics = train(config_of(), console=QUIET).metrics
    assert "nll_per_byte" not in metrics and metrics["nll_per_token"] > 0


def test_another_tokenizer_is_refused_before_anything_is_written(tmp_path, model_factory, rows_file):
    fake = fake_for(model_factory("qwen2"))
    fake.tokenizer_sha256 = "0" * 64
    from student_trainer.config.run import parse_config

    with serve(fake) as server:
        config = parse_config(run_config(tmp_path, model_factory("qwen2"), rows_file, server.address), "test")
        with pytest.raises(MismatchError, match="tokenizer"):
            train(config, console=QUIET)
    assert not config.run.output_dir.exists()
    assert fake.calls == 0


def test_plain_fine_tuning_needs_no_teacher(tmp_path, model_factory, rows_file):
    from student_trainer.config.run import parse_config

    tree = run_config(tmp_path, model_factory("qwen2"), rows_file, loss={"output": None, "sft_weight": 1.0})
    result = train(parse_config(tree, "test"), console=QUIET)
    logged = [e for e in result.curve if "loss" in e]
    assert logged[-1]["sft_loss"] < logged[0]["sft_loss"] == pytest.approx(logged[0]["loss"], rel=1e-5)
    assert "kl_to_teacher" not in result.metrics


@pytest.mark.parametrize("family", ["qwen2", "llama", "internlm3", "glm", "glm4"])
def test_students_of_every_family(tmp_path, model_factory, rows_file, family):
    from student_trainer.config.run import parse_config

    folder = model_factory(family)
    fake = fake_for(folder)
    with serve(fake) as server:
        tree = run_config(
            tmp_path, folder, rows_file, server.address, train={"max_steps": 4, "log_steps": 1, "learning_rate": 1e-2}
        )
        result = train(parse_config(tree, "test"), console=QUIET)
    logged = [e for e in result.curve if "loss" in e]
    assert np.isfinite([e["loss"] for e in logged]).all() and logged[-1]["loss"] != logged[0]["loss"]


def test_learning_rate_is_a_function_of_the_step():
    from student_trainer.config.training import OptimizationConfig

    settings = OptimizationConfig(warmup_steps=4, schedule="cosine", min_lr_share=0.1)
    shares = [learning_rate_share(step, 20, settings) for step in range(21)]
    assert shares[:4] == [0.2, 0.4, 0.6, 0.8] and shares[4] == 1.0
    assert shares[20] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(shares[4:]))


def test_report_to_is_used(config_of):
    config = config_of(train={"max_steps": 2, "log_steps": 1, "report_to": ["tensorboard"]})
    result = train(config, console=QUIET)
    assert list(result.output_dir.rglob("events.out.tfevents*"))
