"""The student: model, tokenizer, adapters; and the two things a loss needs of it, states and head.

In: ModelConfig; out: `Student`. The body is run without its output head: logits are made in chunks inside the loss.
Axes: B sequences, L padded length, D width, V vocabulary rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.utils import logging as transformers_logging

from student_trainer import compiled, fast_lora, internlm
from student_trainer.config import LoraSettings, ModelConfig
from student_trainer.data.tokenizer_file import load_tokenizer
from student_trainer.errors import ModelError
from student_trainer.losses.head import Head, Lora

_DROPOUTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)
# One of these makes a tokenizer; without any, transformers builds an empty one and says nothing.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Outline:
    """What can be told of a student without its weights.

    Attributes:
        tokenizer: its tokenizer.
        vocab_rows: rows of its output head.
        device: where it is.
    """

    tokenizer: Any
    vocab_rows: int
    device: torch.device


@dataclass
class Student:
    """A model to be trained.

    Attributes:
        model: the causal language model, wrapped by peft if it has adapters.
        tokenizer: its tokenizer.
        sha256: of the weights it started from, adapters included.
        is_graphed: its passes may be recorded (`graphed.py`).
    """

    model: Any
    tokenizer: Any
    sha256: str = ""
    is_graphed: bool = False

    @property
    def outline(self) -> Outline:
        """What a teacher is met with."""
        return Outline(self.tokenizer, self.vocab_rows, self.head(2).weight_VD.device)

    @property
    def computed_by(self) -> str:
        """Which kernels round: the device, and whether layers are compiled and passes recorded."""
        device = self.outline.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        ways = (("compiled layers", compiled.is_installed(self.model)), ("recorded passes", self.is_graphed))
        return ", ".join([where, *(way for way, is_so in ways if is_so)])

    @property
    def causal_lm(self) -> Any:
        """The model under the adapters."""
        return _without_adapters(self.model)

    @property
    def vocab_rows(self) -> int:
        """V, rows of the output head."""
        return int(self.causal_lm.get_output_embeddings().weight.shape[0])

    def states(self, input_ids_BL: Tensor) -> Tensor:
        """[B, L, D] after the final norm, with gradients if training, of right-padded sequences.

        No mask is needed, since attention is causal: a token sees nothing of what stands behind it. And without one the fast
        kernels run, and nobody reads a mask back from the device.
        """
        body = self.causal_lm.get_decoder()
        with _one_sequence_a_row():
            return body(input_ids=input_ids_BL, use_cache=False).last_hidden_state

    def head(self, vocab_rows: int) -> Head:
        """The output head over the first `vocab_rows` ids: frozen, trained, tied or with adapters, as it is now."""
        layer = self.causal_lm.get_output_embeddings()
        config = self.causal_lm.config.get_text_config()
        base = getattr(layer, "base_layer", layer)
        head = Head(
            base.weight,
            getattr(base, "bias", None),
            logit_scale=_logit_scale(config),
            final_softcap=_softcap(config),
            lora=_lora_of(layer),
        )
        return head.slice(vocab_rows)


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_student(config: ModelConfig, seed: int) -> Student:
    """Loads model and tokenizer and adds adapters.

    Raises:
        ModelError: missing folder, unknown architecture, remote code needed, no fast tokenizer, unknown target modules.
    """
    folder = _find(config.path)
    torch.manual_seed(seed)  # adapters start from it
    transformers_logging.disable_progress_bar()
    internlm.register()
    with _named(config):
        AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = load_tokenizer(folder, revision=config.revision)
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would start these at random and only warn
        raise ModelError(f"model.path {config.path}: lacks {len(absent)} weights, {absent[0]} first")
    _check_tokenizer(config, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = _with_adapters(model, config.lora, config.gradient_checkpointing)
    digest = _sha256(model)
    if torch.cuda.is_available():  # now: whatever goes beside it, such as the teacher's head, asks where it is
        try:
            model = model.cuda()
        except torch.OutOfMemoryError as error:
            needed, free = sum(p.nbytes for p in model.parameters()) / 2**30, torch.cuda.mem_get_info()[0] / 2**30
            raise ModelError(
                f"model.path {config.path}: its weights in model.dtype={config.dtype} take {needed:,.1f} GiB, "
                f"the GPU has {free:,.1f} left"
            ) from error
    return Student(model, tokenizer, digest, quicken(model, config))


def quicken(model: Any, config: ModelConfig) -> bool:
    """Compiles the layers as configured; returns whether passes are to be recorded, which only a GPU can.

    Raises:
        ModelError: layers that cannot be compiled, or passes that cannot be recorded, and must be.
    """
    on_gpu = torch.cuda.is_available()
    is_compiled = config.compiled is True or (config.compiled == "auto" and on_gpu)
    if is_compiled and not compiled.install(model, required=config.compiled is True):
        if config.compiled is True:
            raise ModelError(f"model.compiled=true: {type(model).__name__} has no decoder layers that can be compiled")
        is_compiled = False
    if not config.graphs:
        return False
    hindrance = _not_recorded(model, config, on_gpu=on_gpu, is_compiled=is_compiled)
    if hindrance and config.graphs is True:
        raise ModelError(f"model.graphs=true {hindrance}")
    return not hindrance


def _not_recorded(model: Any, config: ModelConfig, *, on_gpu: bool, is_compiled: bool) -> str:
    """What keeps passes from being recorded; empty if nothing does."""
    if not on_gpu:
        return "needs a GPU, and there is none"
    if not is_compiled:
        return f"needs compiled layers, and model.compiled={str(config.compiled).lower()} gave none"
    if not any(p.requires_grad for p in _without_adapters(model).get_decoder().parameters()):
        return "has nothing to record: no layer is trained (model.lora.target_modules)"
    dropouts = {f"{name}.p": module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    text = model.config.get_text_config()
    dropouts |= {f"config.{name}": getattr(text, name, 0) for name in _DROPOUTS}
    drawing = next((f"{name}={value}" for name, value in dropouts.items() if value), None)
    return f"cannot record dropout: {drawing} (model.lora.dropout, or the model's config)" if drawing else ""


def load_outline(config: ModelConfig) -> Outline:
    """What can be told of the student from its config and tokenizer; no weight is read.

    Raises:
        ModelError: as `load_student`, as far as it shows without weights.
    """
    folder = _find(config.path)
    internlm.register()
    with _named(config):
        model_config = AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        tokenizer = load_tokenizer(folder, revision=config.revision)
    _check_tokenizer(config, tokenizer)
    return Outline(tokenizer, int(model.get_output_embeddings().weight.shape[0]), torch.device("cpu"))


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Spares transformers two questions whose answers are known.

    Without a mask it looks for several sequences in a row by their positions, on the device, and waits for the answer; and while passes
    are recorded (`graphed.py`) it would not look, and make a mask of all positions instead (masking_utils, 5.16 to 5.19).
    """
    before = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    masking_utils.find_packed_sequence_indices = lambda *_: None
    masking_utils.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = before


@contextlib.contextmanager
def _named(config: ModelConfig) -> Iterator[None]:
    """Turns what transformers raises into an error that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.path {config.path}: cannot be loaded: {str(error)[:400]}") from error


def _check_tokenizer(config: ModelConfig, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"model.path {config.path}: has no fast tokenizer (tokenizer.json), which the handshake needs")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(f"model.path {config.path}: its tokenizer has neither a pad nor an eos token")


def _sha256(model: Any) -> str:
    """Digest of every parameter by name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _find(path: str) -> str:
    """The folder, or the hub id if it is none; a path that is clearly meant to be local must exist."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path {folder}: has no config.json")
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(f"model.path {folder}: has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"model.path {folder}: no such folder")
    return path


def _with_adapters(model: Any, settings: LoraSettings | None, checkpointing: bool) -> Any:
    if settings is None:
        return model
    if checkpointing:
        model.enable_input_require_grads()
    targets = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules {targets}: {error}") from error
    if settings.fused:
        fast_lora.install(adapted)
    return adapted


def _lora_of(layer: Any) -> Lora | None:
    """The low-rank factors of an adapted output head."""
    if not hasattr(layer, "lora_A") or not layer.lora_A:
        return None
    (name,) = layer.active_adapters
    return Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def _logit_scale(config: Any) -> float:
    """The factor an architecture multiplies logits with: Cohere `logit_scale`, Granite `logits_scaling` (a divisor)."""
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _softcap(config: Any) -> float:
    return float(getattr(config, "final_logit_softcapping", None) or 0.0)
