"""Cases 05, 12, 21, 22, 24 and the fp16 part of 06 (cases/README.md), by the real command where it is the point."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from student_trainer.errors import ModelError, StudentError
from student_trainer.model import load as student_model
from student_trainer.training.run import train
from tests.cases.material import INPUTS, MODELS, case_config, train_case
from tests.tiny import make_tokenizer

QUIET = Console(file=io.StringIO(), width=400)


@pytest.mark.parametrize("name", ["f_falcon_h1", "f_granite"])
def test_05_the_first_loss_is_the_models_own(tmp_path, name):
    """Was 6.1956 where the model itself has 5.7267 (Falcon-H1)."""
    config = case_config(tmp_path, f"model.path={MODELS / name}", "train.max_steps=1", "train.batch_size=3")
    seen = []
    original = student_model.Student.forward

    def watched(self, ids_BL, *taps, **named):
        if ids_BL.shape[1] > 16 and not seen:
            seen.append(ids_BL)
        return original(self, ids_BL, *taps, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_model.Student, "forward", watched)
        first = train(config, console=QUIET).curve[0]["sft_loss"]
    assert seen
    from student_trainer.data.inputs import load_data, order_of

    tokenizer = student_model.load_student(config.model, 0).tokenizer
    data, _ = load_data(config.data, tokenizer, QUIET)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for index in order_of(config, data).batch(0):
            example = data[index].example
            ids = torch.from_numpy(example.token_ids).long()
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            wanted = torch.from_numpy(example.loss_mask[1:])
            total, count = total - float(logp[wanted].sum()), count + int(wanted.sum())
    assert first == pytest.approx(total / count, abs=2e-4)


def test_06_float16_is_refused_in_one_line_and_leaves_no_folder(tmp_path):
    found = train_case(tmp_path, "model.dtype=float16", "train.max_steps=5", "train.learning_rate=1e-5")
    assert found.returncode == 2 and "model.dtype=float16" in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "rows", "said"),
    [("extrapad", "unequal.jsonl", "pads with"), ("addedtok", "tool.jsonl", "tool.jsonl:1 has token")],
)
def test_12_ids_beyond_the_embedding_are_named_before_step_0(tmp_path, model, rows, said):
    config = case_config(tmp_path, f"model.path={MODELS / model}", f"data.train=[{INPUTS / rows}]")
    with pytest.raises(ModelError, match=said):
        train(config, console=QUIET)
    assert not config.run.output_dir.exists()


def test_12_added_tokens_that_no_row_holds_are_nobodys_business(tmp_path):
    train(case_config(tmp_path, f"model.path={MODELS / 'addedtok'}", "train.max_steps=1"), console=QUIET)


def test_24_a_row_longer_than_the_positions_is_refused_by_name(tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"instruction": "Go on.", "input": "", "output": "the cat sat " * 300}) + "\n")
    overrides = (f"data.train=[{INPUTS / 'rows.jsonl'}, {long}]", "data.max_tokens=4000")
    config = case_config(tmp_path, *overrides)
    with pytest.raises(StudentError, match=r"long\.jsonl:1: \d+ tokens.*positions for 512.*data\.max_tokens=512"):
        train(config, console=QUIET)
    assert not config.run.output_dir.exists()
    dropped = case_config(tmp_path, overrides[0], "data.max_tokens=512", "data.overlong=drop", "train.max_steps=1")
    train(dropped, console=QUIET)  # the way out that the sentence names


def test_21_the_result_of_an_adapter_run_is_a_model_path_and_a_missing_base_is_named(tmp_path):
    first = train(case_config(tmp_path, "model.lora={rank: 4}", f"run.output_dir={tmp_path}/first"), console=QUIET)
    final = first.output_dir / "final"
    for number, lora in enumerate(("{rank: 4}", "null")):
        found = train_case(
            tmp_path, f"model.path={final}", f"model.lora={lora}", f"run.output_dir={tmp_path}/run{number}"
        )
        assert found.returncode == 0, found.stderr
        assert f"is an adapter (rank 4, alpha 32) of {MODELS / 'qwen2'}" in " ".join(found.stderr.split())
    settings = json.loads((final / "adapter_config.json").read_text())
    (final / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/base"}))
    found = train_case(tmp_path, f"model.path={final}", f"run.output_dir={tmp_path}/run2")
    told = " ".join(found.stderr.split())
    assert found.returncode == 2 and "/gone/base" in told and str(final) in told and "Traceback" not in told


def test_a_pad_token_added_to_the_tokenizer_alone_is_named_unless_the_model_has_room(tmp_path):
    """The relatives of case 12 that are right: a padded embedding has rows for it."""
    from transformers import AutoTokenizer

    from tests.tiny import make_model

    for rows, fits in ((300, False), (304, True)):
        folder = make_model(tmp_path / f"m{rows}", "qwen2", vocab=rows, max_position_embeddings=512)
        make_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.save_pretrained(folder)
        config = case_config(
            tmp_path, f"model.path={folder}", f"run.output_dir={tmp_path}/run{rows}", "train.max_steps=1"
        )
        if fits:
            train(config, console=QUIET)
        else:
            with pytest.raises(ModelError, match="pads with 300"):
                train(config, console=QUIET)
