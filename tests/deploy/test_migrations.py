"""The side-by-side configs of docs/migrate: both sides parse, and what means the same has the same value.

TRL's side is built by its own classes. The other packages need a GPU's worth of dependencies to be imported; where LYCEUM_PEERS names a folder of
their unpacked wheels (`ms_swift`, `axolotl`, `llamafactory`), every setting of theirs is looked up in the classes of their arguments.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from student_trainer.config.run import TrainConfig, load_config

ROOT = Path(__file__).parents[2]
PAGES = {name: ROOT / "docs" / "migrate" / f"{name}.md" for name in ("ms_swift", "trl", "axolotl", "llama_factory")}
# theirs -> ours, by its dotted name; of settings that mean the same
SAME: dict[str, dict[str, str]] = {
    "ms_swift": {
        "model": "model.path", "beta": "loss.output.beta", "lmbda": "on_policy.share", "sft_alpha": "loss.sft_weight",
        "max_completion_length": "on_policy.max_new_tokens", "gkd_logits_topk": "labels.k", "lora_rank": "model.lora.rank",
        "lora_alpha": "model.lora.alpha", "lora_dropout": "model.lora.dropout", "target_modules": "model.lora.target_modules",
        "torch_dtype": "model.dtype", "dataset": "data.train.0.path", "system": "data.system_prompt", "max_length": "data.max_tokens",
    },
    "trl": {
        "model_name_or_path": "model.path", "beta": "loss.output.beta", "lmbda": "on_policy.share", "temperature": "on_policy.temperature",
        "max_new_tokens": "on_policy.max_new_tokens", "lora_r": "model.lora.rank", "lora_alpha": "model.lora.alpha",
        "lora_dropout": "model.lora.dropout", "lora_target_modules": "model.lora.target_modules", "dtype": "model.dtype",
        "max_length": "data.max_tokens", "bf16": "train.bf16",
    },
    "axolotl": {
        "base_model": "model.path", "kd_alpha": "loss.output.weight", "kd_ce_alpha": "loss.sft_weight", "kd_temperature": "loss.output.temperature",
        "kd_online_topk": "labels.k", "lora_r": "model.lora.rank", "lora_alpha": "model.lora.alpha", "lora_dropout": "model.lora.dropout",
        "sequence_len": "data.max_tokens", "sample_packing": "train.packing", "micro_batch_size": "train.batch_size", "num_epochs": "train.epochs",
        "lr_scheduler": "train.schedule", "bf16": "train.bf16",
    },
    "llama_factory": {
        "model_name_or_path": "model.path", "lora_rank": "model.lora.rank", "lora_alpha": "model.lora.alpha", "lora_dropout": "model.lora.dropout",
        "cutoff_len": "data.max_tokens", "packing": "train.packing", "bf16": "train.bf16",
    },
}  # fmt: skip
TRAINER = {
    "per_device_train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulation", "num_train_epochs": "train.epochs",
    "learning_rate": "train.learning_rate", "lr_scheduler_type": "train.schedule", "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay", "max_grad_norm": "train.max_grad_norm", "logging_steps": "train.log_steps",
    "save_steps": "train.save_steps", "save_total_limit": "train.keep_checkpoints", "seed": "run.seed", "output_dir": "run.output_dir",
    "gradient_checkpointing": "model.gradient_checkpointing",
}  # fmt: skip


def blocks(name: str) -> tuple[str, str]:
    """Their side and ours."""
    found = re.findall(r'```(?:yaml|bash) title="[^"]*"\n(.*?)```', PAGES[name].read_text(), re.DOTALL)
    assert len(found) == 2, f"{name}.md shows {len(found)} blocks side by side"
    return found[0], found[1]


def theirs(name: str) -> dict[str, Any]:
    """Their settings as plain data."""
    text = blocks(name)[0]
    if name != "ms_swift":
        read: dict[str, Any] = yaml.safe_load(text)
        return read
    words = shlex.split(text.partition("swift rlhf ")[2].replace("\\\n", " "))
    return {flag[2:]: yaml.safe_load(value) for flag, value in zip(words[::2], words[1::2], strict=True)}


def ours(name: str, folder: Path) -> TrainConfig:
    """Our side, read as the commands read it."""
    file = folder / f"{name}.yaml"
    file.write_text(blocks(name)[1])
    return load_config(file)


def value_at(config: TrainConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


@pytest.mark.parametrize("name", PAGES)
def test_both_sides_parse_and_mean_the_same(name, tmp_path):
    left, config = theirs(name), ours(name, tmp_path)
    pairs = {**TRAINER, **SAME[name]}
    compared = {key: (left[key], value_at(config, dotted)) for key, dotted in pairs.items() if key in left}
    assert SAME[name].keys() <= compared.keys() and len(compared) >= 15
    for key, (their_value, our_value) in compared.items():
        if key == "output_dir":
            assert str(our_value).endswith(str(their_value))
        elif isinstance(their_value, str) and not isinstance(our_value, str):
            assert float(their_value) == our_value, key  # YAML 1.1 reads 1e-4 as text
        else:
            assert their_value == our_value, key


def test_trls_own_classes_take_its_side():
    pytest.importorskip("trl")
    from transformers import HfArgumentParser
    from trl import ModelConfig, ScriptArguments
    from trl.experimental.gkd import GKDConfig

    parser = HfArgumentParser((ScriptArguments, GKDConfig, ModelConfig))
    settings = {**theirs("trl"), "use_cpu": True, "bf16": False, "report_to": "none"}  # the machine's, not the page's
    script, training, model = parser.parse_dict(settings)
    assert (training.beta, training.lmbda, training.temperature, training.max_new_tokens) == (0.5, 0.5, 1.0, 512)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 32, 0.05)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert script.dataset_name == "data/train.jsonl"


@pytest.mark.parametrize(
    ("name", "package", "places"),
    [
        ("ms_swift", "ms_swift", ("swift/arguments", "swift/trainers", "swift/rlhf_trainers", "swift/megatron")),
        ("axolotl", "axolotl", ("axolotl/utils/schemas", "axolotl/integrations/kd")),
        ("llama_factory", "llamafactory", ("llamafactory/hparams",)),
    ],
)
def test_the_other_packages_have_these_settings(name, package, places):
    folder = Path(os.environ.get("LYCEUM_PEERS", "")) / package
    if "LYCEUM_PEERS" not in os.environ or not folder.is_dir():
        pytest.skip("LYCEUM_PEERS names no folder with the package's unpacked wheel")
    from transformers import TrainingArguments

    known = set(TrainingArguments.__dataclass_fields__)
    for place in places:
        for path in (folder / place).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    known |= {
                        one.target.id
                        for one in node.body
                        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
                    }
    assert set(theirs(name)) - known == set()
