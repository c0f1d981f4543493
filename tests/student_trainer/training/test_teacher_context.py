"""Runs whose teacher is told more than the student: the labels are of its prompts, and everything else is the student's."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from student_trainer.config.run import parse_config
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import parse_source
from student_trainer.data.teacher_view import TeacherContext
from student_trainer.errors import ConfigError, DataError, RunError
from student_trainer.labels.packing import pack, pack_own
from student_trainer.model.load import load_student
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from student_trainer.training.windows import MicroBatch, padded
from teacher_wire.core.errors import LimitError, MismatchError
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.training.test_train import losses
from tests.tiny import WORDS

QUIET = Console(file=io.StringIO())
HINT = {"field": "hint", "template": "{message} [{context}]"}


@pytest.fixture(scope="module")
def hinted(tmp_path_factory):
    path = tmp_path_factory.mktemp("hinted") / "rows.jsonl"
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 3]), "completion": " ".join(WORDS[i % 5 : 2 + i % 5 + i % 4]),
         "hint": " ".join(WORDS[: 1 + i % 6])}
        for i in range(16)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def told_of(tmp_path, model_factory, hinted, server):
    """Sections -> a config whose teacher reads the hint."""

    def build(context=HINT, rows=hinted, lora=None, **sections):
        sections = {"loss": {"sft_weight": 0}, "train": {"max_steps": 4}} | sections
        tree = run_config(tmp_path, model_factory("qwen2"), rows, server.address, **sections)
        tree["model"]["lora"] = lora or tree["model"]["lora"]
        tree["teacher"]["context"] = context
        return parse_config(tree, "test")

    return build


@pytest.mark.parametrize("transport", ["hidden", "top_k", "full"])
def test_the_first_losses_are_the_students_on_its_prompt_against_the_teachers_on_its_own(
    told_of, fake, hinted, transport
):
    """By hand: the student's logits where it reads no hint, the fake's where it does."""
    config = told_of(
        labels={"transport": transport} | ({"k": 300} if transport == "top_k" else {}), lora={"rank": 4, "dropout": 0.0}
    )
    result = train(config, console=QUIET)
    first = next(entry for entry in result.curve if "kd_loss" in entry)
    held = next(entry for entry in result.curve if "eval_kl_to_teacher" in entry)
    student = load_student(config.model, config.run.seed)
    context = TeacherContext(**HINT)
    data = build_dataset([parse_source(str(hinted))], student.tokenizer, max_tokens=100, context=context)
    order = RunOrder(len(data), batch_size=2, accumulation=2, epochs=1, max_steps=4, seed=config.run.seed)
    indices = [index for number in range(2) for index in order.batch(number)]
    kl, rows = 0.0, 0
    for index in indices:
        example = data[index].example
        with torch.no_grad():
            z_LV = student.model(torch.tensor(example.token_ids[None].astype(np.int64))).logits[0]
        q = z_LV[np.flatnonzero(example.loss_mask) - 1].double().log_softmax(-1)
        (full,) = [fake.signals(spec_of("full", 300), pack([example]).batch)]
        p = torch.from_numpy(full["logits_NV"].array).double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        rows += len(q)
    assert first["kd_loss"] == pytest.approx(kl / rows, rel=2e-3)
    assert held["eval_kl_to_teacher"] > 0 if transport != "top_k" else True


def test_a_padded_batch_reads_as_the_student_and_asks_as_the_teacher(hinted, model_factory):
    tokenizer = AutoTokenizer.from_pretrained(model_factory("qwen2"))
    made = {
        name: build_dataset([parse_source(str(hinted))], tokenizer, max_tokens=100, context=context)
        for name, context in (("told", TeacherContext(**HINT)), ("bare", None))
    }
    items = [made["told"][i] for i in (0, 5, 3)]
    told, bare = (padded(MicroBatch.of(0, [made[name][i] for i in (0, 5, 3)]), 0) for name in ("told", "bare"))
    for name in ("input_ids_BL", "index_N", "labels_N", "weights_N"):
        assert torch.equal(getattr(told, name), getattr(bare, name))
    asked, own = told.request.batch, pack_own([item.example for item in items])
    assert asked.rows == own.rows == len(told.labels_N) and asked.tokens > own.tokens
    np.testing.assert_array_equal(asked.labels_N(), own.labels_N())
    assert told.request.names == bare.request.names


def test_a_resumed_run_goes_on_and_one_that_is_told_otherwise_is_refused(told_of, tmp_path):
    straight = train(told_of(run={"output_dir": str(tmp_path / "straight")}), console=QUIET)
    run = {"output_dir": str(tmp_path / "cut")}
    train(told_of(run=run, train={"max_steps": 2}), console=QUIET)
    (tmp_path / "cut" / "result.json").unlink()
    with pytest.raises(RunError, match="rows have changed"):
        train(
            told_of(HINT | {"template": "{message} {context}"}, run=run, train={"max_steps": 2}),
            resume=True,
            console=QUIET,
        )
    assert losses(straight.output_dir)[0] == losses(tmp_path / "cut")[0]


def test_labels_made_ahead_are_those_that_the_run_asks_for(told_of, tmp_path, fake):
    label(told_of(), QUIET)
    asked = fake.calls
    result = train(told_of(), console=QUIET)
    assert result.usage.teacher_tokens == 0 and result.usage.disk_tokens > 0
    bare = train(told_of(None, run={"output_dir": str(tmp_path / "bare")}), console=QUIET)
    assert bare.usage.disk_tokens < bare.usage.tokens, "labels behind other prompts have other names"
    assert fake.calls > asked


def test_bad_rows_go_by_policy(told_of, hinted, tmp_path):
    rows = [json.loads(line) for line in hinted.read_text().splitlines()]
    del rows[4]["hint"]
    other = tmp_path / "some.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"some\.jsonl:5: the row lacks the field that teacher\.context"):
        train(told_of(rows=other), console=QUIET)
    result = train(
        told_of(rows=other, data={"train": [str(other)], "eval": [], "max_tokens": 100, "bad_rows": "skip"}),
        console=QUIET,
    )
    (bad,) = [json.loads(line) for line in (result.output_dir / "bad_rows.jsonl").read_text().splitlines()]
    assert bad["line"] == 5 and "hint" in bad["reason"]


def test_what_cannot_be_joined_by_position_is_refused(told_of):
    with pytest.raises(ConfigError, match=r"loss\.attention compares where both look in one text"):
        train(told_of(loss={"attention": {"weight": 0.1, "layers": [[1, 1]]}}), console=QUIET)


def test_states_of_layers_are_joined_too(told_of, model_factory, hinted, tmp_path):
    """As rows, whose places in the two sequences differ."""
    fake = fake_for(model_factory("qwen2"), layers=2)
    with serve(fake) as running:
        tree = run_config(
            tmp_path, model_factory("qwen2"), hinted, running.address, train={"max_steps": 2}, data={"eval": []}
        )
        tree["teacher"]["context"] = HINT
        tree["loss"] = {"hidden": {"weight": 0.1, "layers": [[1, 1]], "reduction": "none"}}
        result = train(parse_config(tree, "test"), console=QUIET)
    assert all(np.isfinite(entry["hidden_loss"]) for entry in result.curve if "hidden_loss" in entry)


def test_a_teachers_prompt_above_its_limit_is_named(told_of, hinted, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in hinted.read_text().splitlines()]
    rows[2]["hint"] = "dog " * 4100
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LimitError, match=r"long\.jsonl:3 is longer than teacher"):
        train(told_of(rows=long), console=QUIET)


def test_another_tokenizer_is_refused_for_what_the_teacher_reads(tmp_path, model_factory, hinted):
    """Tokenizers that differ in an added token alone are one for rows without it; the hint counts."""
    folder = model_factory("qwen2")
    other = tmp_path / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["saw an"])
    tokenizer.save_pretrained(other)
    fake = fake_for(other, vocab_rows=301)
    rows = [json.loads(line) for line in hinted.read_text().splitlines()]
    bare = [row | {"prompt": "the cat", "completion": "sat", "hint": "on a mat"} for row in rows]
    held = [row | {"hint": "he saw an old dog"} if i == 3 else row for i, row in enumerate(bare)]
    for name, these, fits in (("bare", bare, True), ("held", held, False)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in these))
        with serve(fake) as running:
            tree = run_config(tmp_path / name, folder, path, running.address, train={"max_steps": 1}, data={"eval": []})
            tree["teacher"]["context"] = HINT
            if fits:
                assert train(parse_config(tree, "test"), console=QUIET).steps == 1
            else:
                with pytest.raises(MismatchError, match="another tokenizer"):
                    train(parse_config(tree, "test"), console=QUIET)


@pytest.mark.parametrize("loss", [{"divergence": "jsd"}, {"divergence": "pg_rkl"}], ids=["jsd", "pg_rkl"])
def test_rollouts_are_asked_about_behind_the_teachers_own_prompts(told_of, fake, hinted, monkeypatch, loss):
    """By hand: the fake called directly with what it was to read, the log-probabilities with which the tokens were drawn."""
    seen = []
    plain = DistillationTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["batch"])
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    config = told_of(
        labels={"transport": "given" if loss["divergence"] == "pg_rkl" else "full"}, data={"eval": []},
        loss={"output": loss, "sft_weight": 0.0}, on_policy={"share": 1.0, "max_new_tokens": 5, "max_staleness": 0},
        lora={"rank": 4, "dropout": 0.0}, train={"max_steps": 2},
    )  # fmt: skip
    result = train(config, console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    hints = {json.loads(line)["hint"] for line in hinted.read_text().splitlines()}
    apart, weights = [], []
    for batch in seen[:2]:
        asked = batch.request.batch
        for b in range(asked.sequences):
            ids = asked.token_ids_T[asked.cu_lengths_B1[b] : asked.cu_lengths_B1[b + 1]]
            told = tokenizer.decode(ids)
            own = tokenizer.decode(batch.input_ids_BL[b])
            assert told.partition("[")[2].partition("]")[0] in hints and "[" not in own.partition("assistant")[0]
        np.testing.assert_array_equal(asked.labels_N(), batch.labels_N.numpy())
        logits_NV = fake.signals(spec_of("full", 300), asked)["logits_NV"].array.astype(np.float64)
        logp_N = logits_NV[np.arange(len(logits_NV)), batch.labels_N] - np.log(np.exp(logits_NV).sum(-1))
        apart.append(batch.sampled_logp_N.numpy() - logp_N)
        weights.append(batch.weights_N.numpy())
    weights = np.concatenate(weights)
    expected = (np.concatenate(apart) * weights).sum() / weights.sum()
    first = next(entry for entry in result.curve if "kd_loss" in entry)
    if loss["divergence"] == "pg_rkl":
        assert first["kd_loss"] == pytest.approx(expected, rel=1e-3)
    else:
        assert first["kd_loss"] > 0
    assert first["on_policy_share"] == 1


def test_a_teachers_prompt_that_leaves_no_room_for_a_completion_is_named(told_of, hinted, tmp_path):
    rows = [json.loads(line) for line in hinted.read_text().splitlines()]
    rows[2]["hint"] = "dog " * 4060  # with what stands around it, below the teacher's 4096
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    on = {"share": 1.0, "max_new_tokens": 30, "on_failure": "stop"}
    told = (
        r"long\.jsonl:3: its prompt of \d{4} tokens and on_policy\.max_new_tokens=30 are .* that the teacher can read"
    )
    with pytest.raises(ConfigError, match=told):
        train(told_of(rows=long, on_policy=on, data={"eval": []}), console=QUIET)
