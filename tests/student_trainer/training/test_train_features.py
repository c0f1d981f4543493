"""Runs that learn from a teacher's layers over the real wire: what is logged, kept, resumed, exported, and refused by name."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from student_trainer.config.run import dump_config, parse_config
from student_trainer.errors import ConfigError, RunError, StudentError
from student_trainer.training import trainer as trainer_module
from student_trainer.training.checks import all_findings
from student_trainer.training.label_ahead import label
from student_trainer.training.objective import Objective
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.model.test_cuda_graphs import Rerun, Rerunner
from tests.student_trainer.training.test_train import adapter_hash, losses
from tests.tiny import WORDS

QUIET = Console(file=io.StringIO())
ALL = {
    "hidden": {"weight": 1.0, "layers": [1, 3], "rank": 6},
    "attention": {"weight": 0.3, "layers": [2]},
    "ffn": {"weight": 0.2, "layers": [[3, 5]]},
}


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Rows of some 80 tokens, so that there are several blocks of keys."""
    path = tmp_path_factory.mktemp("long") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(12):
            answer = " ".join(WORDS[(i * 5 + k * k) % len(WORDS)] for k in range(48 + i))
            file.write(json.dumps({"prompt": " ".join(WORDS[i : i + 3]), "completion": " " + answer}) + "\n")
    return path


@pytest.fixture
def teacher(model_factory):
    return fake_for(model_factory("qwen2"), layers=6, basis_rank=8)


@pytest.fixture
def run(tmp_path, model_factory, long_rows, teacher):
    """name, sections -> the folder of a run of 6 steps of a student of four blocks."""
    with serve(teacher) as server:

        def config(name, **sections):
            where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
            student = model_factory("qwen2", num_hidden_layers=4)
            tree = run_config(tmp_path, student, long_rows, server.address, run=where, **sections)
            tree["data"] = {"train": [str(long_rows)], "eval": [f"{long_rows}#3"], "max_tokens": 128} | sections.get(
                "data", {}
            )
            return parse_config(tree, "test")

        def go(name, *, resume=False, **sections):
            return train(config(name, **sections), resume=resume, console=QUIET).output_dir

        go.config = config
        yield go


def entries(folder):
    return [entry for entry in losses(folder) if "loss" in entry]


def cache_hits(folder):
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return [entry["cache_hits"] for entry in map(json.loads, lines) if "cache_hits" in entry]


def test_all_three_are_learned_logged_kept_and_dropped_at_export(run, teacher):
    folder = run("run", loss=ALL)
    log = entries(folder)
    names = {
        "hidden_loss",
        "hidden_loss_1",
        "hidden_loss_3",
        "attention_loss",
        "attention_loss_2",
        "ffn_loss",
        "ffn_loss_3",
    }
    assert names <= log[0].keys()
    assert log[-1]["hidden_loss"] < log[0]["hidden_loss"] - 0.1
    for entry in log:
        assert entry["hidden_loss"] == pytest.approx((entry["hidden_loss_1"] + entry["hidden_loss_3"]) / 2, rel=1e-5)
        whole = entry["kd_loss"] + 0.5 * entry["sft_loss"] + entry["hidden_loss"] + 0.2 * entry["ffn_loss"]
        assert whole < entry["loss"] <= whole + 0.3 * entry["attention_loss"] + 1e-6  # of maps, rows from 64 on count
    kept = load_file(folder / "checkpoint-6" / "projectors.safetensors")
    assert {name: tuple(t.shape) for name, t in kept.items()} == {
        f"hidden.layers.{n}.linear.weight": (6, 32) for n in (1, 3)
    }
    *usual, own = json.loads((folder / "checkpoint-6" / "training_state.json").read_text())["param_groups"]
    assert usual[0]["initial_lr"] > 1e-3  # so that projectors learn at the student's own rate
    assert (own["initial_lr"], own["weight_decay"]) == (usual[0]["initial_lr"], 0.0)
    assert not list((folder / "final").glob("projectors*"))
    plain = run("plain")
    names = [load_file(f / "final" / "adapter_model.safetensors").keys() for f in (plain, folder)]
    assert names[0] == names[1] and adapter_hash(plain) != adapter_hash(folder)
    assert not list(plain.glob("layers.*")) and not list(plain.rglob("projectors*"))
    assert "basis" not in json.loads((plain / "run.json").read_text())


def test_features_are_kept_with_the_output_labels_and_cost_no_request_of_their_own(run, teacher):
    run("first", loss=ALL)
    asked = teacher.calls
    folder = run("second", loss=ALL | {"hidden": ALL["hidden"] | {"weight": 2.0}})
    assert teacher.calls == asked and cache_hits(folder) == [1.0] * 6


@pytest.mark.parametrize(
    "loss",
    [
        {
            "hidden": {"weight": 1, "layers": "uniform(2)", "objective": "proj_sl1", "reduction": "int8"},
            "attention": {"weight": 1, "layers": [1, 4], "objective": "relation"},
            "ffn": {"weight": 1, "layers": [2], "objective": "quantiles"},
        },
        {"hidden": {"weight": 10, "layers": 4, "objective": "gram", "reduction": "none"}},
        {"hidden": {"weight": 3, "layers": [3], "objective": "cka"}},
        {"hidden": {"weight": 10, "layers": [2], "objective": "rkd", "rank": 4}},
    ],
)
def test_every_objective_learns(run, loss):
    """Measured on the rows that it is learned from, before and after."""
    steps = {"max_steps": 15, "save_steps": 0, "accumulation": 1, "batch_size": 4}
    folder = run("run", loss=loss | {"output": {"weight": 0.01}, "sft_weight": 0}, train=steps, data={"eval": []})
    assert all(math.isfinite(entry["loss"]) for entry in entries(folder))
    found = json.loads((folder / "layers.json").read_text())
    for name, section in loss.items():
        of_term = [key for key in found["before"] if key.startswith(f"{name}_loss")]
        before, after = (sum(found[when][key] for key in of_term) for when in ("before", "after"))
        assert after < before, (name, section)


class _Stop(Exception):
    """Stands for a kill between two steps."""


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, monkeypatch):
    sections = {"loss": ALL | {"hidden": ALL["hidden"] | {"anneal": {"share": 0.8}}}, "train": {"max_steps": 8}}
    straight = run("straight", **sections)
    original = DistillationTrainer.compute_loss

    def dying(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", dying)
    with pytest.raises(_Stop):
        run("broken", **sections)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", original)
    broken = run("broken", resume=True, **sections)
    assert adapter_hash(broken) == adapter_hash(straight) and losses(broken) == losses(straight)
    for name in ("projectors", "optimizer"):
        one, other = (load_file(f / "checkpoint-8" / f"{name}.safetensors") for f in (broken, straight))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (broken / "layers.json").read_text() == (straight / "layers.json").read_text()


def test_recorded_passes_carry_what_the_terms_read(run, monkeypatch):
    model = {"lora": {"rank": 4}, "gradient_checkpointing": True}
    plain = entries(run("plain", model=model, loss=ALL, data={"eval": []}))
    original = DistillationTrainer.__init__

    def with_recordings(self, config, student, *args, **kwargs):
        student.is_graphed = True
        original(self, config, student, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "CudaRecorder", Rerunner)
    monkeypatch.setattr(trainer_module.cuda_graphs.GraphedBody.__init__, "__defaults__", (lambda: True, 2))
    monkeypatch.setattr(DistillationTrainer, "__init__", with_recordings)
    made = Rerun.made
    recorded = entries(run("recorded", model=model, loss=ALL, data={"eval": []}))
    assert Rerun.made > made
    for one, other in zip(plain, recorded, strict=True):
        one.pop("total_flos", None), other.pop("total_flos", None)  # padding counts too
        assert other == pytest.approx(one, rel=2e-3)


def test_layers_are_measured_before_and_after_and_drawn(run):
    folder = run("run", loss=ALL)
    found = json.loads((folder / "layers.json").read_text())
    names = {"cka_1", "cka_3", "hidden_loss_1", "hidden_loss_3", "attention_loss_2", "ffn_loss_3"}
    assert found["before"].keys() == found["after"].keys() == names
    for name in ("hidden_loss_1", "hidden_loss_3"):
        assert found["after"][name] < found["before"][name]
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_an_annealed_weight_is_gone_at_its_end(run):
    settings = {"weight": 1.0, "layers": [1], "anneal": {"steps": 2}}
    log = entries(run("run", loss={"hidden": settings}))
    for step, share in enumerate([1.0, 0.5, 0.0, 0.0, 0.0, 0.0]):
        entry = log[step]
        parts = entry["kd_loss"] + 0.5 * entry["sft_loss"] + share * entry["hidden_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4), step


def test_labels_of_layers_can_be_fetched_ahead(run, teacher):
    label(run.config("run", loss=ALL, data={"eval": []}), QUIET)
    asked = teacher.calls
    folder = run("run", loss=ALL, data={"eval": []})
    assert cache_hits(folder) == [1.0] * 6
    assert teacher.calls == asked, "those that the picture of the layers is drawn from are fetched too"


def test_sizes_of_requests_count_blocks_and_tokens(run, teacher):
    """A reply of keys and values is larger than its rows say."""
    loss = {"attention": {"weight": 1, "layers": [1], "objective": "relation"}}
    found = all_findings(run.config("plain", data={"eval": []}), QUIET)
    (size,) = (finding.what for finding in found if "reply bytes" in finding.what and "max_reply_mb" in finding.what)
    teacher.max_reply_bytes = int(size.split("request of ")[1].split()[0].replace(",", "")) + 2000
    plain = [finding for finding in all_findings(run.config("plain", data={"eval": []}), QUIET) if not finding.ok]
    config = run.config("run", loss=loss, data={"eval": []})
    bad = [finding for finding in all_findings(config, QUIET) if not finding.ok]
    assert not plain and [finding.setting for finding in bad] == ["train.batch_size"]
    assert "reply bytes by hidden+relation labels, above the teacher's max_reply_mb" in bad[0].what


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ({"hidden": {"weight": 1, "layers": [5]}}, r"loss\.hidden\.layers: block 5 of the student is out of range: its blocks are 1\.\.4"),
        ({"hidden": {"weight": 1, "layers": [[2, 7]]}}, r"loss\.hidden\.layers: block 7 of the teacher .* 1\.\.6"),
        ({"attention": {"weight": 1, "layers": [0]}}, r"loss\.attention\.layers: block 0 of the student"),
        ({"hidden": {"weight": 1, "layers": "uniform(4)"}}, r"loss\.hidden\.layers=uniform\(4\).*at most uniform\(3\)"),
        ({"hidden": {"weight": 1, "layers": [1], "rank": 9}}, r"loss\.hidden: above the rank of the layer_basis.*rank.*9.*8"),
        ({"ffn": {"weight": 1, "layers": [1], "anneal": {"steps": 7}}}, r"loss\.ffn\.anneal\.steps=7 is longer than the run of 6 steps.*at most 6"),
        ({"preset": "article"}, r"loss\.hidden\.layers: block 5 of the student is out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_before_there_is_a_folder(run, tmp_path, loss, named):
    with pytest.raises(ConfigError, match=named):
        run("refused", loss=loss)
    assert not (tmp_path / "refused").exists()
    config = run.config("refused", loss=loss)
    bad = [finding for finding in all_findings(config, QUIET) if not finding.ok]
    assert len(bad) == 1, "check says it too"


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ({"hidden": {"weight": 1, "layers": "uniform"}}, r"loss\.hidden\.layers: 'uniform' is neither uniform\(n\)"),
        ({"hidden": {"weight": 1, "layers": [[1, 2, 3]]}}, r"loss\.hidden\.layers"),
        ({"hidden": {"weight": -1}}, r"loss\.hidden\.weight"),
        (
            {"hidden": {"layers": [1], "objective": "cka"}},
            r"weight=auto is known for objective proj_cos alone, not cka",
        ),
        ({"hidden": {"weight": 1, "objective": "mse"}}, r"loss\.hidden\.objective"),
        ({"hidden": {"weight": 1, "reduction": "none", "rank": 4}}, r"rank belongs to reduction pca, not none"),
        ({"hidden": {"weight": 1, "anneal": {"share": 1.5}}}, r"loss\.hidden\.anneal\.share"),
        ({"hidden": {"weight": 1, "anneal": {}}}, r"exactly one of share and steps"),
        ({"attention": {"weight": 1, "layer": [1]}}, r"loss\.attention\.layer\b"),
        ({"output": None, "sft_weight": 1, "ffn": {"weight": 1}}, r"ffn needs output"),
        ({"preset": "articel"}, r"loss.*preset 'articel' is unknown; choose from article"),
        ({"output": {"temperature": {"start": 2, "end": 1}}}, r"steps or share"),
    ],
)
def test_wrong_settings_are_refused_by_name(run, loss, named):
    with pytest.raises(ConfigError, match=named):
        run.config("refused", loss=loss)


def test_a_teacher_that_cannot_is_refused_by_the_name_of_the_term(run, monkeypatch, tmp_path):
    info = FakeTeacher.teacher_info

    def without(*kinds):
        def told(self):
            found = info(self)
            return type(found)(**{**found.__dict__, "transports": tuple(k for k in found.transports if k not in kinds)})

        monkeypatch.setattr(FakeTeacher, "teacher_info", told)

    for kind, loss in (
        ("layers", {"hidden": {"weight": 1, "layers": [1]}}),
        ("attention", {"attention": {"weight": 1}}),
        ("relation", {"attention": {"weight": 1, "objective": "relation"}}),
        ("ffn", {"ffn": {"weight": 1}}),
    ):
        without(kind)
        (name,) = loss
        with pytest.raises(
            ConfigError, match=rf"loss\.{name}: needs the signal {kind}, which teacher 'fake' does not give"
        ):
            run("refused", loss=loss)
    without("layers")
    run("off", loss={"hidden": {"weight": 0.0, "layers": [1]}}, train={"max_steps": 1, "save_steps": 0})


def test_a_teacher_without_a_basis_is_refused_and_what_needs_none_is_told(run, teacher, tmp_path):
    teacher.basis, teacher.basis_rank = None, 0
    with pytest.raises(
        ConfigError, match=r"loss\.hidden\.reduction=pca: .* has no layer_basis.*`features`.*int8 or none"
    ):
        run("refused", loss={"hidden": {"weight": 1, "layers": [1]}})
    run(
        "run",
        loss={"hidden": {"weight": 1, "layers": [1], "reduction": "int8"}},
        train={"max_steps": 1, "save_steps": 0},
    )


def test_components_of_another_revision_are_refused(run, teacher):
    loss = {"hidden": {"weight": 1, "layers": [1], "rank": 4}}
    folder = run("run", loss=loss)
    (folder / "result.json").unlink()
    teacher.basis_rank, teacher.basis = 7, teacher.blocks.basis(7)
    with pytest.raises(
        RunError, match="the principal components of the teacher's layers have changed since the run was started"
    ):
        run("run", resume=True, loss=loss)


def test_components_that_change_in_the_middle_end_the_run_by_name(run, teacher, monkeypatch):
    original = DistillationTrainer.compute_loss

    def moving(self, *args, **kwargs):
        if self.state.global_step == 1:
            teacher.basis_rank, teacher.basis = 7, teacher.blocks.basis(7)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", moving)
    settings = {
        "loss": {"hidden": {"weight": 1, "layers": [1], "rank": 4}},
        "feed": {"max_batches": 1},
        "cache": {"labels": False},
    }
    with pytest.raises((TeacherWireError, StudentError), match="basis"):
        run("run", **settings)


# ------------------------------------------------------------------- preset


def test_the_articles_preset_is_its_numbers_and_what_is_beside_it_wins(run):
    loss = run.config("run", loss={"preset": "article"}).loss
    assert (loss.attention.weight, loss.hidden.weight, loss.output.weight, loss.sft_weight) == (0.3, 0.5, 0.2, 0.0)
    assert loss.hidden.layers == loss.attention.layers == (1, 5, 12) and loss.ffn is None
    assert [Objective(loss, 300, run_steps=101).at(step).temperature for step in (0, 101, 500)] == [8.0, 1.2, 1.2]
    assert Objective(loss, 300, run_steps=101).at(0).tau_squared
    config = run.config(
        "run", loss={"preset": "article", "attention": None, "hidden": {"layers": [2]}, "output": {"temperature": 2.0}}
    )
    loss = config.loss
    assert loss.attention is None and (loss.hidden.weight, loss.hidden.layers) == (0.5, (2,))
    assert (loss.output.weight, loss.output.temperature) == (0.2, 2.0)
    import yaml

    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_the_articles_preset_trains_on_hidden_labels_and_is_refused_on_truncated_ones(run, tmp_path):
    beside = {"preset": "article", "hidden": {"layers": [1, 2]}, "attention": {"layers": [1, 2]}}
    with pytest.raises(
        ConfigError,
        match=r"loss\.preset=article: loss\.output: top_k labels do not determine the teacher at temperature 8",
    ):
        run("refused", loss=beside, labels={"transport": "top_k", "k": 16})
    assert not (tmp_path / "refused").exists()
    log = entries(run("run", loss=beside))
    assert {"hidden_loss", "attention_loss", "kd_loss"} <= log[0].keys() and log[-1]["hidden_loss"] < log[0][
        "hidden_loss"
    ]


def test_without_a_section_nothing_is_there(run):
    config = run.config("run")
    assert config.loss.features == {} and (config.loss.hidden, config.loss.attention, config.loss.ffn) == (None,) * 3
