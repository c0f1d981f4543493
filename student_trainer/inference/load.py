"""A student to ask, from whatever a user has of one: a run folder, an adapter, a merged or any other model, a hub id.

In: a path; out: model and tokenizer, ready to be asked. Adapters stay beside their base, so that a bfloat16 base computes with exactly what was
trained. Nothing is trained here, and no weight is missing without an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import ConfigError, ModelError
from student_trainer.model import adapters, internlm
from student_trainer.model.load import Student
from student_trainer.model.load import load_student as load_trainable
from student_trainer.model.saving import not_finite

RUN_CONFIG, FINAL = "config.yaml", "final"  # of a run folder (training/run_folder.py)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Located:
    """Which folder of what a user named holds the model.

    Attributes:
        named: as the user wrote it.
        path: folder, or hub id, that is loaded.
        run: the run folder that it belongs to; None for a model without one.
        base: of an adapter, as `--base` or the adapter names it; None for a whole model.
    """

    named: str
    path: str
    run: Path | None = None
    base: str | None = None

    @property
    def config(self) -> Path | None:
        """The resolved config of its run."""
        return None if self.run is None else self.run / RUN_CONFIG

    def before(self) -> str | None:
        """What the student was before it was trained, as far as its folder says: the base of an adapter, `model.path` of a run."""
        if self.config is not None:
            try:
                return str(yaml.safe_load(self.config.read_text())["model"]["path"])
            except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
                raise ModelError(f"{self.config}: does not say model.path: {type(error).__name__}: {error}") from error
        return self.base


def locate(named: str, base: str | None = None) -> Located:
    """Finds the model in what a user named.

    Args:
        named: a run folder (its `final/` is taken), one of its checkpoints, a folder with an adapter or a model, or a hub id.
        base: the base model of an adapter whose own file names another place.

    Raises:
        ModelError: no such folder, a run without a final model, or nothing that is a model; each with what to give instead.
        ConfigError: `base` beside a whole model.
    """
    folder = Path(named).expanduser()
    run = None
    if folder.is_dir() and not _is_model(folder) and (folder / RUN_CONFIG).is_file():
        run, folder = folder, folder / FINAL
        if not folder.is_dir():
            kept = sorted((path.name for path in run.glob("checkpoint-*")), key=lambda name: (len(name), name))
            way_out = f"name one of its checkpoints ({', '.join(kept)})" if kept else "it has no checkpoint either"
            raise ModelError(f"{named}: this run has no {FINAL}/ yet, so it has not ended; {way_out}")
    elif folder.is_dir() and not _is_model(folder):
        raise ModelError(
            f"{named}: is no run folder ({RUN_CONFIG} and {FINAL}/), no adapter ({adapters.CONFIG_NAME}) and no model (config.json)"
        )
    elif not folder.is_dir():
        if folder.exists() or adapters.looks_local(named):
            raise ModelError(f"{named}: no such folder")
        folder = Path(named)
    if not (folder / adapters.CONFIG_NAME).is_file():
        if base is not None and folder.is_dir():
            raise ConfigError(f"--base {base}: {named} is a whole model, which needs no base; leave --base out")
        return Located(named, str(folder), run)
    try:
        own = json.loads((folder / adapters.CONFIG_NAME).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{named}: its {adapters.CONFIG_NAME} cannot be read: {type(error).__name__}") from error
    return Located(named, str(folder), run, base or str(own))


def load(located: Located, device: str = "auto", dtype: str = "auto") -> Student:
    """The student, in evaluation mode.

    Args:
        located: which.
        device: "auto": the GPU if there is one; else as torch names devices.
        dtype: one of DTYPES; "auto": as the weights are saved on a GPU, float32 on a CPU.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or does not fit on the device.
        ConfigError: an unknown device or dtype.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if (trained_on := _quantized(located)) is not None:
        return _in_4_bit(located, trained_on, device)
    sources = _sources(located)
    transformers_logging.disable_progress_bar()
    internlm.register()
    try:
        config = AutoConfig.from_pretrained(sources.model, revision=sources.revision, trust_remote_code=False)
        softly_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        model, loading = AutoModelForCausalLM.from_pretrained(
            sources.model,
            revision=sources.revision,
            dtype=_dtype(dtype, config, place),
            attn_implementation="eager" if softly_capped else "sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = load_tokenizer(sources.tokenizer, revision=sources.tokenizer_revision)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"{located.named}: cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would start these at random and only warn
        raise ModelError(f"{located.named}: {sources.model} lacks {len(absent)} weights, {absent[0]} first")
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{located.named}: has no fast tokenizer (tokenizer.json)")
    if sources.adapter is not None:
        settings = ModelConfig(path=located.path, lora=LoraSettings(fused=False))
        model = adapters.adapt(model, settings, sources.adapter)
    if broken := not_finite(model):
        raise ModelError(f"{located.named}: its weights are not finite, {broken} first")
    try:
        model = model.requires_grad_(False).eval().to(place)
    except torch.OutOfMemoryError as error:
        needed = sum(p.nbytes for p in model.parameters()) / 2**30
        raise ModelError(
            f"{located.named}: its weights take {needed:,.1f} GiB, more than {place} has left; choose --dtype bfloat16 or --device cpu"
        ) from error
    return Student(model, tokenizer)


def _quantized(located: Located) -> ModelConfig | None:
    """The section `model` of a run whose adapters were trained over a base in 4 bit; over the plain base they are another function."""
    if located.config is None or located.base is None:
        return None
    try:
        section = yaml.safe_load(located.config.read_text())["model"]
        return ModelConfig.model_validate(section) if section.get("quantize") else None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{located.config}: does not say how its model was loaded: {type(error).__name__}") from error


def _in_4_bit(located: Located, trained_on: ModelConfig, device: str) -> Student:
    """The student as its run computed with it, which is where bitsandbytes puts it."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto" and torch.device(device).type != here:
        raise ConfigError(f"--device {device}: a base in 4 bit is loaded on {here}; leave --device out")
    plain = {"path": located.path, "lora": LoraSettings(fused=False), "compiled": False, "graphs": False}
    student = load_trainable(trained_on.model_copy(update={**plain, "gradient_checkpointing": False}), seed=0)
    student.model.requires_grad_(False).eval()
    return student


def load_student(folder: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Model (with peft's adapters in it, if it has any) and tokenizer of a run folder, an adapter, a model folder or a hub id.

    Raises:
        ModelError, ConfigError: as `locate` and `load`.
    """
    student = load(locate(str(folder)), device, dtype)
    return student.model, student.tokenizer


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / adapters.CONFIG_NAME).is_file()


def _sources(located: Located) -> adapters.Sources:
    """Where the parts are; the base of an adapter is the one that `located` names."""
    folder = Path(located.path)
    if located.base is None:
        return adapters.find(ModelConfig(path=located.path))
    own = json.loads((folder / adapters.CONFIG_NAME).read_text())
    if own["base_model_name_or_path"] == located.base:
        return adapters.find(ModelConfig(path=located.path))
    weights = folder / adapters.WEIGHTS_NAME
    if own.get("peft_type") != "LORA" or not weights.is_file():
        raise ModelError(f"{located.named}: holds no LoRA adapter with {adapters.WEIGHTS_NAME}")
    base = locate(located.base)
    if base.base is not None:
        raise ModelError(f"--base {located.base}: is an adapter too; name a whole model")
    has_tokenizer = any((folder / name).is_file() for name in adapters.TOKENIZER_FILES)
    return adapters.Sources(
        base.path, None, located.path if has_tokenizer else base.path, None, adapters.Adapter(own, weights)
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: is no device of torch; auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that torch sees")
    return device


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    saved = getattr(config, "dtype", None)
    return saved if device.type != "cpu" and isinstance(saved, torch.dtype) else torch.float32
