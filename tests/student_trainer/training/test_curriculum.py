"""Easy rows first: the difficulty against a hand computation, the list of the run as a pure function, and whole runs, killed and offline."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from rich.console import Console

from student_trainer.config.order.curriculum import CurriculumConfig
from student_trainer.config.run import parse_config
from student_trainer.data.inputs import load_run_data
from student_trainer.errors import ConfigError, RunError
from student_trainer.labels.packing import pack
from student_trainer.model.load import load_outline
from student_trainer.training.curriculum.difficulty import difficulty, easy_to_hard, standardised
from student_trainer.training.curriculum.order import CurriculumOrder, Pace
from student_trainer.training.curriculum.ranking import FILE_NAME, read_ranking, run_ranking
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import run_config
from tests.student_trainer.training.test_train import QUIET, adapter_hash, losses
from tests.student_trainer.training.test_train_traces import trace_rows as trace_rows

PACE = Pace(start=0.1, power=2.0, steps=50, mix=0.1)


def order_of(rows=200, pace=PACE, steps=100, seed=3, batch_size=4, accumulation=2):
    ranked = np.random.default_rng(0).permutation(rows)
    made = CurriculumOrder(
        ranked, pace, batch_size=batch_size, accumulation=accumulation, epochs=1, max_steps=steps, seed=seed
    )
    rank_of = np.empty(rows, np.int64)
    rank_of[ranked] = np.arange(rows)
    return made, rank_of


def windows(order):
    size = order.batch_size * order.accumulation
    return np.array([order[i] for i in range(len(order))]).reshape(-1, size)


# ------------------------------------------------------------------------------------------------- how hard


def test_the_difficulty_is_the_sum_of_standardised_parts():
    nll, tokens, steps = np.array([1.0, 3.0, 2.0, np.nan]), np.array([10, 10, 40, 20]), np.array([0, 4, 0, 0])
    filled = np.array([1.0, 3.0, 2.0, 2.0])  # who is asked about nobody is as hard as the mean

    def z(value):
        return (value - value.mean()) / value.std()

    expected = z(filled) + z(np.log(tokens)) + 0.5 * z(steps.astype(float))
    assert np.allclose(difficulty(CurriculumConfig(), nll, tokens, steps), expected)
    without = difficulty(CurriculumConfig(nll=0, trace_steps=2.0), nll, tokens, steps)
    assert np.allclose(without, z(np.log(tokens)) + 2 * z(steps.astype(float)))
    assert np.allclose(difficulty(CurriculumConfig(), None, tokens, np.zeros(4)), z(np.log(tokens)))
    assert standardised(np.full(3, 0.1)).tolist() == [0, 0, 0], "what all have in common makes nobody harder"


def test_ties_are_broken_by_the_digest_of_the_name():
    names = [f"rows.jsonl:{i}" for i in range(6)]
    by_digest = sorted(range(6), key=lambda i: hashlib.sha256(names[i].encode()).hexdigest())
    assert easy_to_hard(np.zeros(6), names).tolist() == by_digest
    assert easy_to_hard(np.array([5.0, 4, 3, 2, 1, 0]), names).tolist() == [5, 4, 3, 2, 1, 0]


# ------------------------------------------------------------------------------------------------- which when


def test_the_competence_is_the_formula():
    assert PACE.competence(0) == pytest.approx(0.1) and PACE.competence(50) == PACE.competence(10**6) == 1.0
    assert PACE.competence(20) == pytest.approx((0.1**2 + (1 - 0.1**2) * 20 / 50) ** 0.5)
    assert PACE.eligible(0, 200) == 20 and PACE.eligible(0, 3) == 1 and PACE.eligible(50, 200) == 200
    assert Pace(0.25, 1.0, 4, 0.0).competence(2) == pytest.approx(0.625)


def test_rows_come_from_easy_to_hard():
    order, rank_of = order_of()
    found = rank_of[windows(order)]
    limit = np.array([PACE.eligible(step, 200) for step in range(100)])
    beyond = (found >= limit[:, None])[:50]
    assert 0 < beyond.mean() < 0.1, "a tenth of the places are anybody's, and some of those go to easy rows"
    strict, rank_of = order_of(pace=Pace(0.1, 2.0, 50, 0.0))
    assert (rank_of[windows(strict)] < limit[:, None]).all()
    thirds = found[:48].reshape(3, -1).mean(1)
    assert thirds[0] < thirds[1] < thirds[2] < 110


def test_once_all_may_come_every_pass_is_whole():
    strict, _ = order_of(pace=Pace(1.0, 2.0, 1, 0.1), steps=75)
    passes = windows(strict).reshape(3, 200)
    assert all(sorted(one) == list(range(200)) for one in passes.tolist()) and passes[0].tolist() != passes[1].tolist()
    grown, _ = order_of(rows=40, pace=Pace(0.5, 2.0, 10, 0.0), steps=40)
    counts = np.bincount(windows(grown)[10:].reshape(-1), minlength=40)
    assert counts.max() - counts.min() <= 2


def test_the_list_is_a_function_of_seed_and_step_alone():
    long, _ = order_of(steps=100)
    short, _ = order_of(steps=30)
    assert windows(short).tolist() == windows(long)[:30].tolist(), "a longer run begins as the shorter one"
    assert long.batch(7) == windows(long).reshape(-1)[28:32].tolist()
    one_by_one, _ = order_of(batch_size=1, accumulation=8)
    assert windows(one_by_one).tolist() == windows(long).tolist(), "how a window is cut changes nothing"
    assert windows(order_of(seed=4)[0]).tolist() != windows(long).tolist()


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def config_in(tmp_path, model_factory, rows_file):
    def build(name, address, cache_name="cache", **sections):
        where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / cache_name)}
        sections = {"curriculum": {"steps": 4}, "data": {"eval": []}} | sections
        tree = run_config(tmp_path, model_factory("qwen2"), rows_file, address, run=where, **sections)
        return parse_config(tree, "test")

    return build


def nll_by_the_teacher_itself(config, fake):
    """float64 [N], of the rows that a run checks; and the names of the rows."""
    tokenizer = load_outline(config.model).tokenizer
    data, _ = load_run_data(config, tokenizer, QUIET)
    found = []
    for row in data:
        batch = pack([row.example]).batch
        logits = fake.states(batch) @ fake.weight_VD[: len(tokenizer)].T
        logits = logits[batch.rows_of()].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        label = logits[np.arange(batch.rows), batch.labels_N()] - np.log(np.exp(logits).sum(-1))
        found.append(-label[checked_rows(batch)].mean())
    return np.array(found), data


class _Stop(Exception):
    """Stands for a kill between two steps."""


def test_a_killed_run_and_one_without_its_teacher_are_the_straight_one(config_in, fake, monkeypatch, tmp_path):
    told = Console(file=io.StringIO(), width=300)
    with serve(fake) as server:
        train(config_in("straight", server.address, "straight_cache"), console=told)
        label(config_in("one_card", server.address, "one_card_cache"), QUIET)
        broken = config_in("broken", server.address)
        original = DistillationTrainer.compute_loss

        def dying(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise _Stop
            return original(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "compute_loss", dying)
        with pytest.raises(_Stop):
            train(broken, console=QUIET)
        monkeypatch.setattr(DistillationTrainer, "compute_loss", original)
        train(broken, resume=True, console=QUIET)
    offline = config_in("one_card", server.address, "one_card_cache", teacher={"offline": True})
    assert train(offline, console=QUIET).usage.teacher_tokens == 0
    for name in ("broken", "one_card"):
        assert adapter_hash(tmp_path / name) == adapter_hash(tmp_path / "straight"), name
        assert losses(tmp_path / name) == losses(tmp_path / "straight"), name
    assert "from easy to hard by 1 x NLL per token of fake" in told.file.getvalue()
    ranking = read_ranking(tmp_path / "straight")
    nll, data = nll_by_the_teacher_itself(offline, fake)
    tokens = np.array([row.example.token_ids.size for row in data])
    expected = difficulty(CurriculumConfig(), nll, tokens, np.zeros(len(data)))
    assert np.allclose(ranking.score, expected, atol=1e-3)
    assert (np.diff(ranking.score[ranking.ranked]) >= 0).all()


def test_what_a_run_has_begun_with_stays(config_in, fake, tmp_path):
    with serve(fake) as server:
        config = config_in("run", server.address, train={"max_steps": 2}, curriculum={})
        train(config, console=QUIET)
        kept = read_ranking(tmp_path / "run")
        constants = json.loads(json.loads((tmp_path / "run" / "run.json").read_text())["curriculum"])
        assert constants["steps"] == kept.pace.steps == 1 and constants["start"] == 0.1
        longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 200})})
        _, data = nll_by_the_teacher_itself(config, fake)
        assert run_ranking(longer, [], data, QUIET, kept) is kept, "not half of 200"
        (tmp_path / "run" / "result.json").unlink()
        (tmp_path / "run" / FILE_NAME).write_text("{}")
        train(config, resume=True, console=QUIET)  # made anew, and the same by its digest
        assert read_ranking(tmp_path / "run").ranked.tolist() == kept.ranked.tolist()
        (tmp_path / "run" / "result.json").unlink()
        other = json.loads((tmp_path / "run" / FILE_NAME).read_text())
        other["ranked"] = other["ranked"][::-1]
        (tmp_path / "run" / FILE_NAME).write_text(json.dumps(other))
        with pytest.raises(RunError, match="the order of the rows"):
            train(config, resume=True, console=QUIET)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"labels": {"transport": "top_k", "k": 8, "extra_ids": 2}}, r"labels\.extra_ids=2"),
        ({"cache": {"labels": False}}, r"cache\.labels"),
        ({"curriculum": {"nll": 0, "length": 0, "trace_steps": 0}}, "are all 0"),
        ({"curriculum": {"start": 0}}, r"curriculum\.start"),
        ({"curriculum": {"strat": 0.1}}, "did you mean start"),
    ],
)
def test_what_no_order_follows_from_is_refused_by_name(config_in, sections, named):
    with pytest.raises(ConfigError, match=named):
        config_in("run", "there:1", **sections)


def test_a_run_without_a_teacher_goes_by_length(config_in, tmp_path):
    sections = {"teacher": None, "loss": {"output": None, "sft_weight": 1.0}, "train": {"max_steps": 1}}
    told = Console(file=io.StringIO(), width=300)
    train(config_in("sft", None, **sections), console=told)
    assert "from easy to hard by 1 x log length;" in told.file.getvalue()


def test_steps_of_traces_are_counted_and_kept_with_tokenised_rows(tmp_path, model_factory, trace_rows):
    tree = run_config(tmp_path, model_factory("qwen2"), trace_rows, "there:1")
    tree["data"] = {"train": [str(trace_rows)], "max_tokens": 128}
    config = parse_config(tree, "test")
    tokenizer = load_outline(config.model).tokenizer
    counts = [[row.example.trace_steps for row in load_run_data(config, tokenizer, QUIET)[0]] for _ in range(2)]
    assert counts[0] == counts[1] == [2] * 10 + [0], "two tasks of each row with a trace, one of the row without"
