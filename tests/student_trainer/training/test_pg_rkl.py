"""Runs by reverse KL as a policy gradient: what is asked of the teacher, what is learned from which row, and what is refused."""

import io
import shutil

import numpy as np
import pytest
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError
from student_trainer.training.run import train
from teacher_wire.score.signals import spec_of
from tests.student_trainer.conftest import run_config
from tests.student_trainer.training.test_on_policy import go, ledger  # noqa: F401
from tests.student_trainer.training.test_train import adapter_hash, losses

ON = {"share": 1.0, "max_new_tokens": 6, "max_staleness": 0}
PG = {"output": {"divergence": "pg_rkl"}, "sft_weight": 0.0}
GIVEN = {"transport": "given"}
STILL = {"compiled": False, "lora": {"rank": 4, "dropout": 0.0}}


def by_hand(fake, batches):
    """Mean of log q(y) - log p(y) over the sampled tokens of micro-batches, by the fake called directly; and how many there are."""
    apart, weights = [], []
    for batch in batches:
        signals = fake.signals(spec_of("full", 300), batch.request.batch)
        wide = signals["logits_NV"].array.astype(np.float64)
        logp = wide[np.arange(len(wide)), batch.labels_N.numpy()] - np.log(np.exp(wide).sum(-1))
        sampled = np.full(len(wide), np.nan) if batch.sampled_logp_N is None else batch.sampled_logp_N.numpy()
        own = ~np.isnan(sampled)
        apart.append((sampled - logp)[own])
        weights.append(batch.weights_N.numpy()[own])
    weights = np.concatenate(weights)
    return float((np.concatenate(apart) * weights).sum() / weights.sum()), float(weights.sum())


@pytest.mark.parametrize("transport", ["given", "hidden", "top_k", "full"])
def test_the_logged_loss_is_the_reverse_kl_of_the_samples(go, fake, transport):  # noqa: F811
    folder, seen = go(
        "run",
        loss=PG,
        labels={"transport": transport} | ({"k": 7} if transport == "top_k" else {}),
        on_policy=ON,
        model=STILL,
    )
    first = losses(folder)[0]
    expected, _ = by_hand(fake, seen[:2])
    assert first["kd_loss"] == pytest.approx(expected, rel=1e-3)
    assert first["loss"] == pytest.approx(first["kd_loss"], rel=1e-3) and first["clipped"] == 0
    assert first["rollout_reverse_kl"] > 0  # of some rows, and without their weights
    assert first["sft_loss"] == 0, "the student's own words have no cross-entropy"
    assert first["staleness"] == 0 and ("teacher_agreement" in first) == (transport != "given")


def test_eight_bytes_a_token_teach_what_every_logit_does(go):  # noqa: F811
    """The loss of every step is the same, up to rounding, however the teacher's word travels."""
    runs = [go(name, loss=PG, labels={"transport": name}, on_policy=ON, model=STILL)[0] for name in ("given", "full")]
    given, full = ([entry["kd_loss"] for entry in losses(folder) if "kd_loss" in entry] for folder in runs)
    assert given == pytest.approx(full, rel=1e-3)


def test_rows_of_the_data_learn_from_the_cross_entropy_alone(go, fake):  # noqa: F811
    folder, seen = go("run", loss=PG | {"sft_weight": 0.5}, labels=GIVEN, on_policy=ON | {"share": 0.5}, model=STILL)
    entries = losses(folder)
    for step, entry in enumerate(entries[:6]):
        window = seen[2 * step : 2 * step + 2]
        own = sum(0 if b.sampled_logp_N is None else (~b.sampled_logp_N.isnan()).sum() for b in window)
        rows = sum(len(b.labels_N) for b in window)
        if own == 0:
            assert entry["kd_loss"] == 0 and entry["sft_loss"] > 0
            continue
        if step == 0:
            expected, weight = by_hand(fake, window)
            assert entry["kd_loss"] == pytest.approx(expected, rel=1e-3)
            whole = sum(b.weight for b in window)
            parts = weight * entry["kd_loss"] + 0.5 * (whole - weight) * entry["sft_loss"]
            assert entry["loss"] == pytest.approx(parts / whole, rel=1e-3)
        assert entry["sft_loss"] == 0 if own == rows else entry["sft_loss"] > 0
    shares = {len([one for one in ledger(folder) if one["step"] == step]) for step in range(6)}
    assert len(shares) > 1, "the coins of this seed give different shares"


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one(go, staleness):  # noqa: F811
    settings = dict(loss=PG, labels=GIVEN, on_policy=ON | {"max_staleness": staleness}, model=STILL)
    straight, _ = go("straight", **settings)
    cut, _ = go("cut", **settings)
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(cut / name)
    (cut / "result.json").unlink()
    go("cut", resume=True, **settings)
    assert losses(straight) == losses(cut) and adapter_hash(straight) == adapter_hash(cut)


def test_held_out_rows_are_measured_by_labels_that_can(go):  # noqa: F811
    folder, _ = go("run", loss=PG, labels=GIVEN, on_policy=ON, model=STILL, data={}, train={"max_steps": 2})
    assert losses(folder)[-1]["eval_kl_to_teacher"] > 0


def test_auto_asks_for_no_more_than_it_needs(go):  # noqa: F811
    told = io.StringIO()
    _, seen = go(
        "run", loss=PG, labels={"transport": "auto"}, on_policy=ON, model=STILL, console=Console(file=told, width=300)
    )
    assert "labels by given: pg_rkl needs no more of the teacher: 8 bytes per token" in told.getvalue()
    assert set(seen[0].labels.named) == {"lse_N", "label_logp_N"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"on_policy": None}, r"loss\.output\.divergence=pg_rkl learns from the student's own samples alone.*on_policy"),
        ({"on_policy": ON | {"temperature": 0.7}}, r"on_policy\.temperature=0\.7: pg_rkl weighs samples .* temperature 1"),
        ({"on_policy": ON | {"share": 0.5}}, r"on_policy\.share is below 1 .*loss\.sft_weight is 0"),
        ({"on_policy": {"max_new_tokens": 4}}, r"on_policy\.share is below 1"),
        ({"on_policy": {"share": {"start": 1, "end": 0.5}}}, r"on_policy\.share is below 1"),
        ({"labels": {"transport": "top_k", "k": 9, "extra_ids": 3}}, r"labels\.extra_ids=3: pg_rkl reads nothing but"),
        ({"loss": {"output": {"divergence": "pg_rkl", "temperature": 2.0}}}, r"pg_rkl is about .* temperature must be 1, not 2"),
        ({"loss": {"output": {"divergence": "pg_rkl", "temperature": {"start": 1, "end": 2, "share": 1}}}}, "temperature must be 1, not 2"),
        ({"loss": {"output": {"divergence": "reverse_kl"}}}, r"labels\.transport=given holds no distribution, which reverse_kl needs"),
        ({"loss": {"output": {"divergence": "jsd", "clip": 0.1}}}, r"clip belongs to divergence pg_rkl, not jsd"),
        ({"loss": {"output": {"divergence": "pg_rkl", "clip": 0}}}, r"loss\.output\.clip"),
        ({"loss": {"output": {"divergence": "pg_rkl", "tempered_head": True}}, "labels": {"transport": "top_k"}}, "tempered_head"),
    ],
)  # fmt: skip
def test_what_would_teach_nothing_or_something_else_is_refused_by_name(
    tmp_path, model_factory, rows_file, server, sections, said
):
    sections = {"loss": PG, "labels": GIVEN, "on_policy": ON, "data": {"eval": []}} | sections
    sections["loss"] = {"sft_weight": 0.0} | sections["loss"]
    with pytest.raises(ConfigError, match=said):
        train(
            parse_config(run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, **sections), "test"),
            console=Console(file=io.StringIO()),
        )
    assert not (tmp_path / "run").exists()


def test_a_truncated_distribution_of_samples_is_advised_against(go):  # noqa: F811
    told = io.StringIO()
    go(
        "run",
        loss=PG,
        labels=GIVEN,
        on_policy=ON | {"top_p": 0.9},
        model=STILL,
        train={"max_steps": 2},
        console=Console(file=told, width=300),
    )
    assert "on_policy.top_p=0.9: the samples of pg_rkl are then not the student's distribution" in told.getvalue()
    assert "far from its own" not in told.getvalue(), "no word on what given labels do not tell"
