"""Comparisons against a teacher behind the real wire: what is made, what is not made again, what is refused."""

import io
import json

import pytest
from rich.console import Console

from student_trainer.comparison import run as comparing
from student_trainer.comparison.arms import Arm, free_arm, named_arm
from student_trainer.comparison.plan import Comparison
from student_trainer.comparison.reading import of_runs, read_source
from student_trainer.comparison.run import compare
from student_trainer.errors import ConfigError, DataError, RunError
from student_trainer.evaluation.report import paired
from student_trainer.training.run_folder import result_of
from tests.student_trainer.conftest import run_config

TREE = {"loss": {"output": {"divergence": "jsd"}, "hidden": {"weight": 1.0}}, "model": {"path": "m", "lora": None}}


def console():
    return Console(file=io.StringIO(), width=300)


@pytest.fixture
def tree(tmp_path, model_factory, rows_file, server):
    model = model_factory("qwen2", seed=3, num_hidden_layers=1)
    made = run_config(tmp_path, model, rows_file, server.address, train={"max_steps": 4, "save_steps": 0})
    return {**made, "model": {**made["model"], "lora": {"rank": 2}}}


def comparison(tree, folder, *names, seeds=(0, 1), **more):
    arms = [name if isinstance(name, Arm) else named_arm(name) for name in names]
    return Comparison(tree, "test.yaml", arms, seeds, folder, **more)


def test_named_arms_say_what_is_learned_from():
    made = {name: named_arm(name).of(TREE)["loss"] for name in ("sft", "gkd", "gkd+sft", "article", "config")}
    assert made["sft"] == {"output": None, "sft_weight": 1.0}
    assert made["gkd"] == {"output": {"divergence": "jsd"}, "sft_weight": 0.0}
    assert made["gkd+sft"] == {"output": {"divergence": "jsd"}, "sft_weight": 0.5}
    assert made["article"] == {"preset": "article"} and made["config"] == TREE["loss"]
    assert named_arm("on-policy").of(TREE)["on_policy"] == {} and "on_policy" not in TREE
    assert named_arm("lora").of(TREE)["model"] == {"path": "m", "lora": {}}
    arm = free_arm("k8", "gkd labels.transport=top_k labels.k=8 loss.output='{divergence: skew_kl, alpha: 0.2}'")
    assert arm.of(TREE)["labels"] == {"transport": "top_k", "k": 8}
    assert arm.of(TREE)["loss"] == {"output": {"divergence": "skew_kl", "alpha": 0.2}, "sft_weight": 0.0}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: named_arm("sftt"), "arm 'sftt' is unknown; there are config, sft, gkd"),
        (lambda: named_arm("../up"), "a name of up to 64 letters"),
        (lambda: free_arm("a", " "), "--arm a: says no settings"),
        (lambda: free_arm("a", "x='"), "--arm a: .* cannot be read"),
        (lambda: free_arm("a", "run.seed=3"), "arm a: run.seed is the comparison's to set: use --seeds"),
        (lambda: free_arm("a", "lorra labels.k=8"), "arm 'lorra' is unknown"),
    ],
)
def test_arms_that_are_none_are_refused(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_budgets_that_do_not_fit_are_refused(tree, tmp_path):
    with pytest.raises(ConfigError, match="--equal time needs --minutes"):
        comparison(tree, tmp_path, "sft", equal="time")
    with pytest.raises(ConfigError, match="add --equal time"):
        comparison(tree, tmp_path, "sft", minutes=3.0)
    with pytest.raises(ConfigError, match="arm 'sft' is there twice"):
        comparison(tree, tmp_path, "sft", "sft")
    with pytest.raises(ConfigError, match="at equal steps they must be the same"):
        comparison(tree, tmp_path, "sft", free_arm("long", "train.max_steps=9")).configs()
    with pytest.raises(ConfigError, match=r"data.eval is empty"):
        comparison({**tree, "data": {**tree["data"], "eval": []}}, tmp_path, "sft").configs()
    with pytest.raises(ConfigError, match=r"test.yaml, arm a: loss.output.divergenze: unknown key"):
        comparison(tree, tmp_path, "sft", free_arm("a", "loss.output.divergenze=jsd")).configs()


def test_a_comparison_is_made_once_grows_and_is_the_figures_of_its_runs(tree, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    outcome = compare(comparison(tree, folder, "sft", "gkd"), console())
    assert outcome.is_done and [(r.name, r.seed, r.steps) for r in outcome.arms] == [
        ("sft", 0, 4), ("gkd", 0, 4), ("sft", 1, 4), ("gkd", 1, 4)
    ]  # fmt: skip
    assert read_source(folder) == outcome and {p.name for p in folder.iterdir()} == {
        "arms", "arms.json", "comparison.json", "heldout.png", "loss.png", "report.md"
    } - ({"heldout.png"} if not any("eval_nll_per_byte" in e for r in outcome.arms for e in r.curve) else set())  # fmt: skip
    of = {(run.name, run.seed): run for run in outcome.arms}
    for key, run in of.items():
        left = result_of(folder / run.folder)
        assert run.metrics == left.metrics and run.cost.train_s > 0 and run.cost.wall_s > run.cost.train_s, key
    difference = outcome.results().paired()["gkd"]["kl_to_teacher"]
    values = [[of[arm, seed].metrics["kl_to_teacher"] for seed in (0, 1)] for arm in ("gkd", "sft")]
    assert difference == paired(*values) and of["gkd", 0].settings["loss.sft_weight"] == 0.0
    assert of["gkd", 0].cost.label_bytes > 0 and of["gkd", 0].cost.teacher_tokens + of["gkd", 0].cost.disk_tokens > 0
    assert of["gkd", 1].cost.disk_tokens > 0, "the second seed finds the labels of the first"
    assert not list(folder.rglob("checkpoint-*")), "kept only until a run has ended"

    alone = of_runs([folder / "arms" / "gkd-1"])
    assert (
        alone.names == ["gkd-1"]
        and alone.seeds == [1]
        and alone.is_done
        and alone.arms[0].metrics == of["gkd", 1].metrics
    )

    made = []
    monkeypatch.setattr(comparing, "train", lambda config, **_: made.append(config.run.output_dir.name))
    assert compare(comparison(tree, folder, "sft", "gkd"), console()) == outcome and not made
    changed = {**tree, "train": {**tree["train"], "learning_rate": 2e-2}}
    with pytest.raises(RunError, match=r"arm sft was begun with other settings \(train.learning_rate: 0.01 -> 0.02\)"):
        compare(comparison(changed, folder, "sft", "gkd"), console())
    rows = {**tree, "data": {**tree["data"], "max_tokens": 90}}
    with pytest.raises(RunError, match=r"data.max_tokens: 100 -> 90"):
        compare(comparison(rows, folder, "sft", "gkd"), console())
    with pytest.raises(RunError, match="was begun at equal steps"):
        compare(comparison(tree, folder, "sft", equal="time", minutes=1.0), console())
    monkeypatch.undo()
    more = compare(comparison(tree, folder, "sft", "gkd", "gkd+sft", seeds=(0,)), console())
    assert [run.name for run in more.arms] == ["sft", "gkd", "gkd+sft"] and more.arms[:2] == outcome.arms[:2]


def test_a_run_that_fails_is_not_done_and_the_others_stay(tree, tmp_path):
    folder, said = tmp_path / "out", console()
    bad = free_arm("bad", "sft train.learning_rate=1e30 model.lora=null")
    outcome = compare(comparison(tree, folder, "sft", bad, "gkd", seeds=(0,)), said)
    states = {run.name: run.state for run in outcome.arms}
    assert states == {"sft": "done", "bad": "failed", "gkd": "done"} and not outcome.is_done
    assert "failed:" in said.file.getvalue() and "finite" in outcome.runs_of("bad")[0].error
    assert outcome.results().arms["bad"]["acc1"] == [None] and "gkd" in outcome.results().paired()
    markdown = (folder / "report.md").read_text()
    assert "## Not all runs are done" in markdown and "| bad | none |" in markdown


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_killed_run_goes_on_at_its_checkpoint_and_ends_with_the_same_figures(tree, tmp_path, monkeypatch):
    whole = compare(comparison(tree, tmp_path / "whole", "sft", seeds=(0,)), console())
    real = comparing.Watch.on_step_end

    def dies(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise Killed

    monkeypatch.setattr(comparing.Watch, "on_step_end", dies)
    with pytest.raises(Killed):
        compare(comparison(tree, tmp_path / "out", "sft", seeds=(0,)), console())
    broken = read_source(tmp_path / "out")
    assert broken.arms[0].state == "failed" and broken.arms[0].metrics == {}
    monkeypatch.undo()
    said = console()
    outcome = compare(comparison(tree, tmp_path / "out", "sft", seeds=(0,)), said)
    assert "resuming at step 2" in said.file.getvalue()
    assert outcome.is_done and outcome.arms[0].metrics == whole.arms[0].metrics
    ledger = json.loads((tmp_path / "out" / "arms" / "sft-0.json").read_text())
    assert [attempt["step"] for attempt in ledger["attempts"]] == [2, 4] and outcome.arms[0].cost.at_least


def test_rows_that_have_changed_meanwhile_are_not_compared(tree, tmp_path, rows_file):
    rows = tmp_path / "own.jsonl"
    rows.write_text(rows_file.read_text())
    own = {**tree, "data": {**tree["data"], "train": [str(rows)], "eval": [f"{rows}#6"]}}
    compare(comparison(own, tmp_path / "out", "sft", seeds=(0,)), console())
    rows.write_text(rows.read_text().replace("cat", "dog"))
    outcome = compare(comparison(own, tmp_path / "out", "sft", "gkd", seeds=(0,)), console())
    assert outcome.runs_of("gkd")[0].state == "failed" and "the held-out rows of arm gkd" in outcome.arms[1].error
    with pytest.raises(RunError, match="cannot be compared"):
        compare(comparison(own, tmp_path / "out", "sft", "gkd", seeds=(0,)), console())


def test_equal_time_counts_steps_from_a_pilot_once(tree, tmp_path, monkeypatch):
    from student_trainer.comparison import pace

    monkeypatch.setattr(pace, "PILOT_STEPS", 4)
    monkeypatch.setattr(pace, "WARM_STEPS", 2)
    said, piloted = console(), []
    real = pace._seconds_per_step

    def fixed(plan, arm, trains):
        piloted.append(arm.name)
        assert arm.name == "gkd" or real(plan, arm, trains) > 0
        return {"sft": 20.0, "gkd": 30.0}[arm.name]

    monkeypatch.setattr(pace, "_seconds_per_step", fixed)
    for _ in range(2):
        outcome = compare(comparison(tree, tmp_path / "out", "sft", "gkd", seeds=(0,), equal="time", minutes=1.0), said)
    assert [run.steps for run in outcome.arms] == [3, 2] and piloted == ["sft", "gkd"]
    assert outcome.budget.told == "1 min of training (2 to 3 optimizer steps)"
    assert any("sft trained for 0.0 min" in note for note in outcome.notes), "missed minutes are told"
    assert not (tmp_path / "out" / "pilots").exists()


def test_what_is_no_comparison_is_refused_in_a_line(tmp_path):
    for path, told in ((tmp_path / "none", "is not there"), (tmp_path, "holds neither comparison.json")):
        with pytest.raises(DataError, match=told):
            read_source(path)
    (tmp_path / "comparison.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match=r"comparison.json: is no comparison.json of format 1: format"):
        read_source(tmp_path)


def test_a_report_reads_the_names_that_runs_write_and_loads_no_torch():
    import subprocess
    import sys

    from student_trainer.comparison import reading
    from student_trainer.training import run_folder

    for name in ("CONFIG_NAME", "IDENTITY_NAME", "LAYERS_NAME", "LOG_NAME", "RESULT_NAME"):
        assert getattr(reading, name) == getattr(run_folder, name)
    code = "import sys, student_trainer.comparison.reporting, student_trainer.comparison.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_run_wrote_and_cannot_be_read_is_counted(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"no": "step"}\n')
    found = of_runs([folder])
    assert [entry["step"] for entry in found.arms[0].curve] == [1]
    assert "mine: lines of train_log.jsonl that cannot be read, and are no part of its curve: 2." in found.notes
    assert "mine: its config.yaml cannot be read, so no settings of it are shown." in found.notes
