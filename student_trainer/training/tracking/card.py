"""The model card: README.md in final/, which says of a trained student what it learned from whom, what came of it, and how it is used.

In: what a run knows at its end; out: Markdown with the metadata that the Hugging Face hub reads. Names local folders by their last part alone:
a card is for others, who have nothing of the paths of this machine.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, try_to_load_from_cache

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.files import write_whole
from student_trainer.model.load import Student
from student_trainer.teachers.session import TeacherSession

NAME = "README.md"
_PACKAGES = ("lyceum-distill", "torch", "transformers", "peft", "bitsandbytes")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FIGURES = {
    "nll_per_byte": "held-out NLL, nats per byte",
    "nll_per_token": "held-out NLL, nats per token",
    "kl_to_teacher": "KL to the teacher, nats per token",
    "acc1": "acc1: the teacher-forced token is the first",
    "acc3": "acc3: it is among the first three",
}


def write_card(
    folder: Path,
    config: TrainConfig,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    sessions: Sequence[TeacherSession],
    curve: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
) -> None:
    """Writes README.md into the folder of a finished model, in place of what peft has put there; a user's own stays.

    Args:
        folder: `final/` of the run.
        curve: its log entries, in order.
        metrics: the last held-out figures, with or without `eval_`.

    Raises:
        OSError: the disk does not take it.
    """
    if _is_a_users(folder / NAME):
        return
    write_whole(folder / NAME, card_text(config, student, data, held_out, sessions, curve, metrics))


def _is_a_users(file: Path) -> bool:
    """Whether a card is neither of a run of ours nor the form that peft writes."""
    if not file.is_file():
        return False
    told = file.read_text(errors="replace")
    return "- lyceum\n" not in told and "Model Card for Model ID" not in told


def card_text(
    config: TrainConfig,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    sessions: Sequence[TeacherSession],
    curve: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
) -> str:
    """See `write_card`."""
    base = str(getattr(student.causal_lm.config, "_name_or_path", "") or config.model.path)
    is_adapter = config.model.lora is not None
    sources = [source.path.partition("#")[0] for source in config.data.train]
    meta = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        license=licence_of(base),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lyceum", "distillation", *(["gkd"] * (config.on_policy is not None)), *(["lora"] * is_adapter)],
        datasets=sorted({path for path in sources if _is_hub_id(path)}) or None,
    )
    parts = [
        f"---\n{meta.to_yaml()}\n---",
        f"# {config.run.output_dir.name}",
        f"{_shown(base)}, trained by Lyceum to answer as its {'teachers do' if len(sessions) > 1 else 'teacher does'}."
        if sessions
        else f"{_shown(base)}, trained on its data by Lyceum, without a teacher.",
        _teachers(config, sessions),
        _data(config, data, held_out, sources),
        _training(config, curve),
        _figures(curve, metrics),
        _use(base, config, is_adapter),
        _versions(student),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def licence_of(base: str) -> str | None:
    """What the base model's own card says of its licence, where that is on this machine; nothing is asked of the network."""
    place: Any = Path(base) / NAME
    if not Path(base).is_dir():
        place = try_to_load_from_cache(base, NAME) if _is_hub_id(base) else None
    if not isinstance(place, str | Path) or not Path(place).is_file():
        return None
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---", Path(place).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    licence = said.get("license") if isinstance(said, dict) else None
    return licence if isinstance(licence, str) else None


def _is_hub_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not Path(path).expanduser().exists()


def _shown(path: str) -> str:
    return f"`{path}`" if _is_hub_id(path) else f"`{Path(path).name}`"


def _teachers(config: TrainConfig, sessions: Sequence[TeacherSession]) -> str:
    if not sessions:
        return ""
    weights = {teacher.called: teacher.weight for teacher in config.teachers}
    rows = [
        f"| {session.info.name} | `{session.info.fingerprint[:16]}` | {session.labels.transport} | "
        f"{weights.get(session.info.name, weights.get(session.name, 1)):g} |"
        for session in sessions
    ]
    return "\n".join(
        ["## Teachers", "", "| name | fingerprint | labels | weight |", "| --- | --- | --- | --- |", *rows]
    )


def _data(config: TrainConfig, data: TokenizedDataset, held_out: TokenizedDataset | None, sources: list[str]) -> str:
    lines = [
        f"- trained on {len(data):,} sequences: {data.tokens:,} tokens, of which {data.target_tokens:,} are learned",
        f"- sources: {', '.join(map(_shown, sources))}",
    ]
    if held_out is not None:
        lines.append(f"- held out: {len(held_out):,} sequences, {held_out.target_tokens:,} tokens")
    if data.dropped:
        lines.append(f"- left out as longer than {config.data.max_tokens:,} tokens: {len(data.dropped):,}")
    if data.bad_rows:
        lines.append(f"- left out as unreadable: {len(data.bad_rows):,}")
    return "\n".join(["## Data", "", *lines, f"- SHA-256 of the tokenised rows: `{data.sha256[:16]}`"])


def _training(config: TrainConfig, curve: Sequence[Mapping[str, Any]]) -> str:
    train, loss, lora = config.train, config.loss, config.model.lora
    steps = max((int(entry["step"]) for entry in curve if "step" in entry), default=0)
    weights = "every weight" if lora is None else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}"
    if config.model.quantize is not None:
        weights += f", over a base in 4 bit ({config.model.quantize.kind})"
    objective = [f"{loss.output.divergence}"] if loss.output is not None else []
    objective += list(loss.features)
    objective += [f"{loss.sft_weight:g} x cross-entropy"] if loss.sft_weight else []
    rows = {
        "trained": weights,
        "dtype": config.model.dtype,
        "loss": " + ".join(objective),
        "steps": f"{steps:,} of {train.batch_size} x {train.accumulation} sequences",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}",
        "longest sequence": f"{config.data.max_tokens:,} tokens",
        "seed": str(config.run.seed),
    }
    if config.on_policy is not None:
        rows["own samples"] = "a share of the sequences is written by the student itself (on-policy)"
    return "\n".join(
        ["## Training", "", "| | |", "| --- | --- |", *(f"| {name} | {said} |" for name, said in rows.items())]
    )


def _figures(curve: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    losses = [entry for entry in curve if entry.get("loss") is not None]
    rows = []
    if losses:
        names = [name for name in losses[-1] if name == "loss" or name.endswith("_loss")]
        for name in names:
            first = next((entry[name] for entry in losses if entry.get(name) is not None), None)
            rows.append(f"| {name} | {_number(first)} | {_number(losses[-1].get(name))} |")
    found = [("first", "last", rows)] if rows else []
    text = [f"| | {a} | {b} |\n| --- | --- | --- |\n" + "\n".join(lines) for a, b, lines in found]
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    if plain:
        held = [f"| {_FIGURES.get(name, name)} | {_number(value)} |" for name, value in plain.items()]
        text.append("| held out, after training | |\n| --- | --- |\n" + "\n".join(held))
    return "\n\n".join(["## Figures", *text]) if text else ""


def _use(base: str, config: TrainConfig, is_adapter: bool) -> str:
    own = config.train.hub_id or "final"
    shown = base if _is_hub_id(base) else Path(base).name
    if is_adapter:
        load = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{shown}", dtype="{config.model.dtype}")
model = PeftModel.from_pretrained(base, "{own}")
tokenizer = AutoTokenizer.from_pretrained("{own}")"""
    else:
        load = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{own}", dtype="{config.model.dtype}")
tokenizer = AutoTokenizer.from_pretrained("{own}")"""
    prompt = """ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))"""
    system = f"\n\nTrained with the system prompt: {config.data.system_prompt!r}." if config.data.system_prompt else ""
    note = (
        "\n\nThe base was in 4 bit while the adapter was trained; over the base in 16 bit its answers differ by the rounding of 4 bit."
        if config.model.quantize is not None
        else ""
    )
    return f"## Use\n\n```python\n{load}\n{prompt}\n```{system}{note}"


def _versions(student: Student) -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"## Versions\n\nPython {platform.python_version()}, {', '.join(found)}; computed by: {student.computed_by}."


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"
