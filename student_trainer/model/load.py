"""The student: model, tokenizer, adapters; and the two things a loss needs of it, states and head.

In: ModelConfig; out: `Student`.
Trained whole, a model has float32 weights whatever `model.dtype` says, and computes in that dtype: a step at lr 1e-5 is less than
a bfloat16 can hold of most weights. Adapters are float32 over a base in `model.dtype`.
Axes: B sequences, L padded length, D width, V vocabulary rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from student_trainer.config.model import ModelConfig
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import ModelError
from student_trainer.losses.head import Head
from student_trainer.losses.term import StudentOutputs, Tap
from student_trainer.model import adapters, internlm, logit_probe, precision
from student_trainer.model.forward import SharedRows, run_body
from student_trainer.model.limits import position_limit
from student_trainer.model.quantized import weights as quantized
from student_trainer.model.saving import not_finite
from student_trainer.model.speed import compiled

_DROPOUTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)


@dataclass(frozen=True)
class Outline:
    """What can be told of a student without its weights.

    Attributes:
        tokenizer: its tokenizer.
        vocab_rows: rows of its output head.
        device: where it is.
        embedding_rows: ids that can be read by it.
        positions: longest sequence it has positions for; None if its architecture knows no such limit.
        blocks: how many decoder blocks it has.
    """

    tokenizer: Any
    vocab_rows: int
    device: torch.device
    embedding_rows: int
    positions: int | None
    blocks: int = 0


@dataclass
class Student:
    """A model to be trained.

    Attributes:
        model: the causal language model, wrapped by peft if it has adapters.
        tokenizer: its tokenizer.
        sha256: of the weights it started from, adapters included.
        is_graphed: its passes may be recorded (`speed/cuda_graphs.py`).
        shares_rows: several sequences stand in one row while it trains (`train.packing`).
        narrowed: what float32 weights compute in while they are trained whole; None: in their own dtype.
        exported: dtype of the weights in a finished run; None: as they are.
        notes: what a user should know of how it was loaded, a sentence each.
    """

    model: Any
    tokenizer: Any
    sha256: str = ""
    is_graphed: bool = False
    shares_rows: bool = False
    narrowed: torch.dtype | None = None
    exported: torch.dtype | None = None
    notes: tuple[str, ...] = ()

    @property
    def outline(self) -> Outline:
        """What a teacher is met with."""
        device = self.causal_lm.get_output_embeddings().weight.device
        return _outline(self.tokenizer, self.causal_lm, device)

    @property
    def computed_by(self) -> str:
        """Which kernels round: the device, and whether layers are compiled and passes recorded."""
        device = self.outline.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        ways = (
            ("a base in 4 bit", quantized.is_quantized(self.model)),
            ("compiled layers", compiled.is_installed(self.model)),
            ("recorded passes", self.is_graphed),
            ("shared rows", self.shares_rows),
            (f"float32 weights narrowed to {str(self.narrowed).removeprefix('torch.')}", self.narrowed is not None),
        )
        return ", ".join([where, *(way for way, is_so in ways if is_so)])

    @property
    def causal_lm(self) -> Any:
        """The model under the adapters."""
        return _without_adapters(self.model)

    @property
    def body(self) -> Any:
        """The part of it that makes states."""
        return logit_probe.body_of(self.causal_lm)

    @property
    def pad_id(self) -> int:
        """What is written behind the shorter sequences of a batch; attention never sees it."""
        pad_id = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad_id is None else pad_id)

    @property
    def vocab_rows(self) -> int:
        """V, rows of the output head."""
        return int(self.causal_lm.get_output_embeddings().weight.shape[0])

    def forward(
        self, input_ids_BL: Tensor, taps: Sequence[Tap] = (), shared: SharedRows | None = None
    ) -> StudentOutputs:
        """A pass over right-padded sequences, with gradients if training (`forward.run_body`)."""
        with self.computing():
            outputs = run_body(self.body, input_ids_BL, taps, shared)
        if self.narrowed is None:
            return outputs
        # as the head is: two dtypes would keep its product from the tensor cores
        return replace(outputs, final_BLD=outputs.final_BLD.to(self.narrowed))

    def states(self, input_ids_BL: Tensor) -> Tensor:
        """[B, L, D] after the final norm; see `forward`."""
        return self.forward(input_ids_BL).final_BLD

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """What its passes are computed under: autocast, if float32 weights compute in a narrower dtype."""
        if self.narrowed is None:
            return contextlib.nullcontext()
        # No cache: each weight is read once a pass, and a recorded pass must not find casts of another.
        device = self.causal_lm.get_output_embeddings().weight.device
        return torch.autocast(device.type, self.narrowed, cache_enabled=False)

    def head(self, vocab_rows: int) -> Head:
        """The output head over the first `vocab_rows` ids: frozen, trained, tied or with adapters, as it is now."""
        layer = self.causal_lm.get_output_embeddings()
        transform = logit_probe.transform_of(self.causal_lm.config)
        base = getattr(layer, "base_layer", layer)
        head = Head(
            base.weight,
            getattr(base, "bias", None),
            logit_scale=transform.scale,
            final_softcap=transform.cap,
            lora=adapters.lora_of(layer),
        ).slice(vocab_rows)
        return head if self.narrowed is None else replace(head, weight_VD=head.weight_VD.to(self.narrowed))

    def check(self, config: ModelConfig) -> None:
        """Refuses a model whose logits are not head(states(ids)).

        Raises:
            ModelError: naming architecture, difference and what to do.
        """
        model = self.causal_lm
        if model.get_output_embeddings() is None:
            raise ModelError(f"model.path {config.path}: {type(model).__name__} has no output head")
        dtype = self.narrowed or next(model.parameters()).dtype

        def own(ids_BL: Tensor) -> Tensor:
            with self.computing():
                return model(input_ids=ids_BL, use_cache=False).logits

        logit_probe.check_logits(model, own, self.states, self.head(self.vocab_rows), config.path, dtype)

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None, *, exported: bool) -> None:
        """Writes the model, or its adapters, as safetensors.

        Args:
            folder: where to.
            state_dict: the weights, if the caller has them already.
            exported: in `model.dtype`, for others to use; else every bit, for a run to go on with.
        """
        if not exported or self.exported is None:
            self.model.save_pretrained(folder, state_dict=state_dict)
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        self.model.save_pretrained(folder, state_dict=precision.narrow(state_dict, self.exported))
        precision.write_dtype(folder, self.exported)


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_student(config: ModelConfig, seed: int) -> Student:
    """Loads model and tokenizer and adds adapters.

    Raises:
        ModelError: missing folder, unknown architecture, remote code needed, no fast tokenizer, unknown target modules, logits that
            are not those of the head, a dtype or a size that cannot be trained.
    """
    precision.check_trained_in(config)
    quantized.check_quantizable(config)
    sources = adapters.find(config)
    torch.manual_seed(seed)  # adapters start from it
    transformers_logging.disable_progress_bar()
    internlm.register()
    dtype = getattr(torch, config.dtype)
    with _named(config, sources):
        model_config = AutoConfig.from_pretrained(sources.model, revision=sources.revision, trust_remote_code=False)
        quantized.check_as_stored(config, getattr(model_config, "quantization_config", None))
        attention = _attention(config, model_config)
        model, loading = AutoModelForCausalLM.from_pretrained(
            sources.model,
            revision=sources.revision,
            dtype=dtype if config.lora else torch.float32,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **quantized.loading_options(config),
        )
        tokenizer = load_tokenizer(sources.tokenizer, revision=sources.tokenizer_revision)
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would start these at random and only warn
        raise ModelError(f"model.path {sources.model}: lacks {len(absent)} weights, {absent[0]} first")
    _check_tokenizer(config, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    in_4_bit = quantized.prepare(model, config)
    model = adapters.adapt(model, config, sources.adapter)
    digest = _sha256(model)
    if torch.cuda.is_available():  # now: whatever goes beside it, such as the teacher's head, asks where it is
        try:
            model = model.cuda()
        except torch.OutOfMemoryError as error:
            needed, free = sum(p.nbytes for p in model.parameters()) / 2**30, torch.cuda.mem_get_info()[0] / 2**30
            held = f"model.dtype={config.dtype}" if config.lora else "float32 (model.lora=null)"
            raise ModelError(
                f"model.path {config.path}: its weights in {held} take {needed:,.1f} GiB, the GPU has {free:,.1f} left"
            ) from error
    masters = config.lora is None and config.dtype != "float32"
    student = Student(
        model,
        tokenizer,
        digest,
        narrowed=precision.narrowed(config, torch.cuda.is_available()),
        exported=dtype if masters else None,
        notes=(*_adapter_notes(config, sources), *in_4_bit, *precision.notes(config, model)),
    )
    if broken := not_finite(model):
        raise ModelError(f"model.path {config.path}: its weights are not finite, {broken} first")
    student.check(config)
    student.is_graphed = quicken(model, config)
    return student


def _attention(config: ModelConfig, model_config: Any) -> str:
    """transformers' attn_implementation.

    Raises:
        ModelError: one that would leave out what the model does to its attention scores.
    """
    softcap = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    if not softcap:
        return "sdpa" if config.attention == "auto" else config.attention
    if config.attention == "sdpa":
        raise ModelError(
            f"model.attention=sdpa: {config.path} caps its attention scores (attn_logit_softcapping={softcap}), which sdpa leaves out; set "
            "it to auto or eager"
        )
    return "eager" if config.attention == "auto" else config.attention


def _adapter_notes(config: ModelConfig, sources: adapters.Sources) -> tuple[str, ...]:
    if sources.adapter is None:
        return ()
    what = f"{config.path} is an adapter ({sources.adapter.shape}) of {sources.model}"
    if config.lora is None:
        return (f"{what}: it is merged, and every weight is trained",)
    return (f"{what}: training goes on with it, in its own shape",)


def _outline(tokenizer: Any, causal_lm: Any, device: torch.device) -> Outline:
    return Outline(
        tokenizer,
        int(causal_lm.get_output_embeddings().weight.shape[0]),
        device,
        logit_probe.embedding_rows(causal_lm),
        position_limit(causal_lm.config.get_text_config()),
        int(getattr(causal_lm.config.get_text_config(), "num_hidden_layers", 0)),
    )


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
    if not config.graphs or (config.graphs == "auto" and config.quantize is not None):
        return False  # recordings of 4-bit layers have not been proven on a GPU: they are made where they are asked for
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
    if not any(p.requires_grad for p in logit_probe.body_of(_without_adapters(model)).parameters()):
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
    sources = adapters.find(config)
    internlm.register()
    with _named(config, sources):
        model_config = AutoConfig.from_pretrained(sources.model, revision=sources.revision, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        tokenizer = load_tokenizer(sources.tokenizer, revision=sources.tokenizer_revision)
    _check_tokenizer(config, tokenizer)
    return _outline(tokenizer, model, torch.device("cpu"))


@contextlib.contextmanager
def _named(config: ModelConfig, sources: adapters.Sources) -> Iterator[None]:
    """Turns what transformers raises into an error that names the model, and the base of an adapter."""
    base = f" (an adapter of {sources.model})" if sources.adapter else ""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.path {config.path}{base}: cannot be loaded: {str(error)[:400]}") from error


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
        quantized.digest_into(digest, parameter)
    return digest.hexdigest()
