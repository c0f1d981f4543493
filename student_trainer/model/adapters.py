"""Low-rank adapters: new ones, those of a folder to go on with, and those merged into their base.

In: a path that may be an adapter's, a loaded base model, settings; out: the model with the adapters that are to be trained.
Axes: D width, V vocabulary rows, R rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file, find_adapter_config_file

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.errors import ModelError
from student_trainer.losses.head import Lora
from student_trainer.model.speed import lora as fast_lora

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# One of these makes a tokenizer; without any, transformers builds an empty one and says nothing.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder says.

    Attributes:
        settings: of adapter_config.json.
        weights: its safetensors file.
    """

    settings: dict[str, Any]
    weights: Path

    @property
    def shape(self) -> str:
        """Rank and scale, for people."""
        return f"rank {self.settings.get('r')}, alpha {self.settings.get('lora_alpha'):g}"


@dataclass(frozen=True)
class Sources:
    """Where the parts of a model are.

    Attributes:
        model: folder or hub id of the whole model, for an adapter its base.
        revision: of a hub id.
        tokenizer: folder or hub id of the tokenizer.
        tokenizer_revision: of a hub id.
        adapter: None if `model.path` is a whole model.
    """

    model: str
    revision: str | None
    tokenizer: str
    tokenizer_revision: str | None
    adapter: Adapter | None = None


def find(config: ModelConfig) -> Sources:
    """Looks what `model.path` is: a folder that exists, a hub id, or an adapter of either, whose base is then looked up.

    Raises:
        ModelError: a local path that is no model, or an adapter of a kind, or of a base, that cannot be used; both are named.
    """
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if (folder / CONFIG_NAME).is_file():
            return _sources(config, str(folder), folder / CONFIG_NAME, folder / WEIGHTS_NAME)
        _check_folder(folder, f"model.path {folder}")
        return Sources(str(folder), config.revision, str(folder), config.revision)
    if looks_local(config.path):
        raise ModelError(f"model.path {folder}: no such folder")
    try:  # a hub id: asked for one small file
        told = find_adapter_config_file(config.path, revision=config.revision)
        if told is not None:
            weights = cached_file(config.path, WEIGHTS_NAME, revision=config.revision)
            return _sources(config, config.path, Path(told), Path(weights))
    except OSError as error:
        raise ModelError(f"model.path {config.path}: cannot be loaded: {str(error)[:400]}") from error
    return Sources(config.path, config.revision, config.path, config.revision)


def looks_local(path: str) -> bool:
    """Whether a path that does not exist is clearly no hub id (`name` or `owner/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _check_folder(folder: Path, what: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{what}: has neither config.json nor {CONFIG_NAME}")
    if not _has_tokenizer(folder):
        raise ModelError(f"{what}: has no tokenizer ({', '.join(TOKENIZER_FILES)})")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _sources(config: ModelConfig, path: str, settings_file: Path, weights: Path) -> Sources:
    """The parts of an adapter at `path`."""
    what = f"model.path {path}"
    try:
        settings = json.loads(settings_file.read_text())
        base = settings["base_model_name_or_path"]
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{what}: its {CONFIG_NAME} cannot be read: {type(error).__name__}: {error}") from error
    if kind != "LORA":
        raise ModelError(f"{what}: holds adapters of kind {kind}; LORA alone is supported")
    if not weights.is_file():
        raise ModelError(f"{what}: holds an adapter of {base!r}, but no {WEIGHTS_NAME}")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{what}: holds an adapter whose {CONFIG_NAME} names no base model (base_model_name_or_path)")
    local = next((p for p in (Path(base).expanduser(), settings_file.parent / base) if p.is_dir()), None)
    if local is not None:
        if (local / CONFIG_NAME).is_file():
            raise ModelError(
                f"{what}: holds an adapter of {base}, which is an adapter too; merge that one into its base first"
            )
        if not (local / "config.json").is_file():
            raise ModelError(f"{what}: holds an adapter of {base}, and that folder has no config.json")
        base = str(local)
    elif looks_local(base):
        raise ModelError(
            f"{what}: holds an adapter of {base!r}, and there is no such folder; put the base model there, or write where it is into "
            f"base_model_name_or_path of {settings_file}"
        )
    folder = Path(path).expanduser()
    own = not folder.is_dir() or _has_tokenizer(folder)
    if not own and local is not None:
        _check_folder(local, f"{what}: has no tokenizer, and its base {base}")
    revision = settings.get("revision")
    return Sources(
        base, revision, path if own else base, config.revision if own else revision, Adapter(settings, weights)
    )


def adapt(model: Any, config: ModelConfig, adapter: Adapter | None) -> Any:
    """The model with what is to be trained: new adapters, those of `adapter`, or all weights with `adapter` merged into them.

    Raises:
        ModelError: unknown target modules, or an adapter that does not fit model or settings.
    """
    settings = config.lora
    if adapter is not None and settings is not None:
        _check_same(config.path, settings, adapter)
    if settings is None:
        return model if adapter is None else _merged(model, config, adapter)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    if adapter is not None:
        adapted = _loaded(model, config, adapter, settings.dropout)
    else:
        adapted = _new(model, settings)
    if settings.fused:
        fast_lora.install(adapted)
        if config.quantize is not None:
            from student_trainer.model.quantized import linear  # loads bitsandbytes

            linear.install_adapters(adapted)
    return adapted


def _new(model: Any, settings: LoraSettings) -> Any:
    targets = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules {targets}: {error}") from error


def _check_same(path: str, settings: LoraSettings, adapter: Adapter) -> None:
    """An adapter keeps its own shape; settings that say another, and not just their default, are refused."""
    for name, key in (("rank", "r"), ("alpha", "lora_alpha"), ("target_modules", "target_modules")):
        said, own, default = getattr(settings, name), adapter.settings.get(key), LoraSettings.model_fields[name].default
        if isinstance(own, list):
            said, own = said if isinstance(said, str) else sorted(said), sorted(own)
        if said not in (own, default):
            raise ModelError(
                f"model.lora.{name}={said}: model.path {path} holds an adapter with {name} {own}, with which training would go on; "
                f"leave model.lora.{name} out, or merge the adapter into its base first"
            )


def _merged(model: Any, config: ModelConfig, adapter: Adapter) -> Any:
    adapted = _loaded(model, config, adapter, 0.0)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    if tied and any(hasattr(layer, "base_layer") for layer in (head, embedding)):
        raise ModelError(
            f"model.path {config.path}: its adapter changes the output head or the embedding alone, which are one weight here "
            "(tie_word_embeddings): they are tied and it cannot be merged; set model.lora to go on with the adapter"
        )
    return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)  # peft froze them


def _loaded(model: Any, config: ModelConfig, adapter: Adapter, dropout: float) -> Any:
    """The model with the adapter's weights in its layers, to be trained."""
    what = f"model.path {config.path}: its adapter does not fit {adapter.settings['base_model_name_or_path']}"
    try:
        settings = LoraConfig(**_known(adapter.settings, config.path))
        settings.inference_mode, settings.lora_dropout = False, dropout
        adapted = get_peft_model(model, settings)
        state = load_file(str(adapter.weights))
        result = set_peft_model_state_dict(adapted, state)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise ModelError(f"{what}: {str(error)[:300]}") from error
    absent = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if absent or result.unexpected_keys:
        raise ModelError(
            f"{what}: {len(absent)} of its layers' weights are missing and {len(result.unexpected_keys)} fit none, "
            f"{(absent or result.unexpected_keys)[0]} first"
        )
    return adapted


def _known(settings: dict[str, Any], path: str) -> dict[str, Any]:
    """What this version of peft knows of an adapter's settings; of others only those that say nothing may be there."""
    fields = LoraConfig.__dataclass_fields__
    strange = sorted(name for name, value in settings.items() if name not in fields and value)
    strange = [name for name in strange if name not in ("peft_version", "auto_mapping")]
    if strange:
        raise ModelError(
            f"model.path {path}: its {CONFIG_NAME} has settings that this peft does not know: {', '.join(strange)}"
        )
    return {name: value for name, value in settings.items() if name in fields and name != "runtime_config"}


def lora_of(layer: Any) -> Lora | None:
    """The low-rank factors of an adapted output head."""
    if not hasattr(layer, "lora_A") or not layer.lora_A:
        return None
    (name,) = layer.active_adapters
    return Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
