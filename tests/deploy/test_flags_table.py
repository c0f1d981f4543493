"""The table of docs/migrate/ms_swift.md from ms-swift's flags to ours: every flag of it has a translation here that parses, and together they train."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer.cli.main import COMMANDS
from student_trainer.config.run import load_config
from student_trainer.training.run import train
from teacher_server.config.server import load_config as load_server
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
TOP_K = ["labels.transport=top_k", "labels.k=64"]
# flag -> what is written for it, as overrides of the article's config.
OURS: dict[str, list[str]] = {
    "--rlhf_type": ["loss={output: {divergence: jsd}}"],
    "--model": ["model.path=Qwen/Qwen2.5-0.5B-Instruct"],
    "--teacher_model": [],  # the server's: see the test
    "--teacher_model_server": ["teacher.address=gpu-box:50051"],
    "--tuner_type": ["model.lora=null"],
    "--train_type": ["model.lora=null"],
    "--lora_rank": ["model.lora.rank=16"],
    "--lora_alpha": ["model.lora.alpha=32"],
    "--lora_dropout": ["model.lora.dropout=0.05"],
    "--target_modules": ["model.lora.target_modules=all-linear"],
    "--adapters": ["model.path=runs/before/final", "model.lora={rank: 16}"],
    "--quant_method": ["model.quantize=nf4"],
    "--quant_bits": ["model.quantize=nf4"],
    "--packing": ["train.packing=true"],
    "--push_to_hub": ["train.push_to_hub=true", "train.hub_id=me/student"],
    "--hub_model_id": ["train.push_to_hub=true", "train.hub_id=me/student"],
    "--torch_dtype": ["model.dtype=bfloat16", "train.bf16=true"],
    "--attn_impl": ["model.attention=sdpa"],
    "--gradient_checkpointing": ["model.gradient_checkpointing=true"],
    "--dataset": ["data.train=[rows.jsonl#7]"],
    "--val_dataset": ["data.eval=[rows.jsonl#7]"],
    "--split_dataset_ratio": ["data.eval=[rows.jsonl#7]"],
    "--columns": ["data.train=[{path: rows.jsonl, columns: {q: prompt}}]"],
    "--system": ["data.system_prompt=Answer briefly."],
    "--max_length": ["data.max_tokens=512"],
    "--truncation_strategy": ["data.overlong=drop"],
    "--per_device_train_batch_size": ["train.batch_size=4"],
    "--gradient_accumulation_steps": ["train.accumulation=4"],
    "--per_device_eval_batch_size": ["train.eval_batch_size=4"],
    "--num_train_epochs": ["train.epochs=2"],
    "--max_steps": ["train.max_steps=7"],
    "--learning_rate": ["train.learning_rate=2e-5"],
    "--lr_scheduler_type": ["train.schedule=cosine"],
    "--warmup_steps": ["train.warmup_steps=3"],
    "--weight_decay": ["train.weight_decay=0.1"],
    "--max_grad_norm": ["train.max_grad_norm=0.5"],
    "--save_steps": ["train.save_steps=50"],
    "--eval_steps": ["train.eval_steps=50"],
    "--logging_steps": ["train.log_steps=5", "train.save_steps=50"],
    "--save_total_limit": ["train.keep_checkpoints=3"],
    "--output_dir": ["run.output_dir=runs/other"],
    "--seed": ["run.seed=7"],
    "--report_to": ["train.report_to=[tensorboard]"],
    "--resume_from_checkpoint": ["--resume", "--resume-from"],
    "--config": ["--config", "--set"],
    "--beta": ["loss={output: {divergence: jsd, beta: 0.3}}"],
    "--gkd_logits_topk": TOP_K,
    "--temperature": ["loss.output.temperature=2.0", "on_policy={temperature: 0.9}"],
    "--sft_alpha": ["loss.sft_weight=0.5"],
    "--lmbda": ["on_policy={share: 0.5}"],
    "--max_completion_length": ["on_policy={max_new_tokens: 64}"],
    "--top_p": ["on_policy={top_p: 0.9}"],
    "--use_vllm": ["on_policy={engine: vllm}"],
    "--seq_kd": ["generate={output_dir: runs/answers}"],
}  # fmt: skip
OUR_OPTIONS = {"--resume", "--resume-from", "--set", "--generate"}  # of the commands, in the table's second column


def rows() -> list[tuple[str, str]]:
    """Both cells of every row of the table."""
    text = (
        (ROOT / "docs" / "migrate" / "ms_swift.md")
        .read_text()
        .partition("| ms-swift (`swift rlhf")[2]
        .partition("\n\n")[0]
    )
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert all(len(cell) == 2 for cell in cells)
    return [(one, other) for one, other in cells]


def flags(cell: str) -> list[str]:
    return re.findall(r"--[\w-]+", cell)


ROWS = rows()


def test_every_flag_of_the_table_has_a_translation_and_every_translation_a_row():
    named = {flag for theirs, ours in ROWS for flag in [*flags(theirs), *flags(ours)]} - OUR_OPTIONS
    assert named == OURS.keys() - {"--rlhf_type"}
    assert len(ROWS) >= 25


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[flags(theirs)[0] for theirs, _ in ROWS])
def test_a_row_says_what_parses(theirs, ours):
    for flag in flags(theirs):
        for override in OURS[flag]:
            if override.startswith("--"):
                continue
            names = re.findall(r"[a-z0-9_]+(?=[=:])", override)
            assert any(name in ours for name in names), f"{override} of {flag} is not what the row says: {ours}"
        overrides = [override for override in OURS[flag] if not override.startswith("--")]
        if any("on_policy" in override for override in overrides):  # whose temperature and labels are of one kind
            overrides = ["loss={output: {divergence: jsd}}", *overrides]
        if "train.packing=true" in overrides:  # the article's maps of attention are of one sequence a row
            overrides.append("loss={output: {divergence: jsd}}")
        load_config(EXAMPLES / "article.yaml", overrides)


def test_options_of_the_commands_that_the_table_names_are_theirs():
    from typer.testing import CliRunner

    from student_trainer.cli.main import app

    assert {"train", "label"} <= {command.name for command in COMMANDS}
    shown = "".join(
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output for name in ("train", "label")
    )
    assert all(option in shown for option in OUR_OPTIONS | {"--config"})


def test_the_articles_teacher_is_the_servers():
    config = load_server(EXAMPLES / "qwen2.5-7b.yaml", ["teachers.0.backend.model=Qwen/Qwen2.5-7B-Instruct"])
    article = load_config(EXAMPLES / "article.yaml")
    assert [article.teacher.name] == [teacher.name for teacher in config.teachers]


def test_the_article_is_the_articles():
    config = load_config(EXAMPLES / "article.yaml")
    lora, features = config.model.lora, config.loss.features
    assert (lora.rank, lora.alpha, lora.target_modules) == (16, 32, "all-linear")
    assert {name: section.weight for name, section in features.items()} == {"hidden": 0.5, "attention": 0.3}
    assert config.loss.output.weight == 0.2
    assert [list(section.layers) for section in features.values()] == [[1, 5, 12], [1, 5, 12]]
    assert (config.loss.output.temperature.start, config.loss.output.temperature.end) == (8.0, 1.2)


@pytest.mark.parametrize("combination", ["article", "flags"])
def test_it_trains(combination, model_factory, rows_file, tmp_path):
    """The article's config as it is, and the table's other way (JSD on top-k labels); tiny models in place of Qwen's, two steps."""
    model = model_factory(
        "qwen2", num_hidden_layers=12 if combination == "article" else 2
    )  # block 12 is one of the article's
    flags_of = {
        "article": [],
        "flags": [
            *TOP_K, "loss={output: {divergence: jsd, beta: 0.3}}", "loss.sft_weight=0.5", "model.lora.dropout=0.05", "train.weight_decay=0.1",
            "train.keep_checkpoints=1", "run.seed=7",
        ],
    }[combination]  # fmt: skip
    with serve(fake_for(model, layers=12, hidden_size=24)) as server:
        config = load_config(
            EXAMPLES / "article.yaml",
            [
                *flags_of, f"run.output_dir={tmp_path / 'run'}", f"run.cache_dir={tmp_path / 'cache'}", f"model.path={model}",
                "model.dtype=float32", "train.bf16=false", f"data.train=['{rows_file}#8']", f"data.eval=['{rows_file}#2']",
                "data.max_tokens=120", f"teacher={{address: '{server.address}'}}", "train.max_steps=2", "train.eval_steps=2", "train.accumulation=1",
                "train.save_steps=2", "train.log_steps=1", "train.warmup_steps=1", "train.report_to=[]",
            ],
        )  # fmt: skip
        result = train(config, console=Console(file=io.StringIO()))
    assert result.steps == 2
    assert result.metrics
    first = result.curve[0]
    assert first["loss"] > 0
    logged = {name for name in first if name.endswith("_loss")}
    assert logged == {"article": {"kd_loss", "sft_loss", "hidden_loss", "attention_loss"}}.get(combination, logged), (
        first
    )
