"""Any causal language model that transformers loads, as a teacher.

In: packed tokens of several requests; out: reduced signals on the host. One right-padded forward pass
per group of similar lengths, the state after the final norm, then the head in bounded chunks.
Axes: b sequences of a group, L padded length, N wanted rows, C chunk rows, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor as Torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from teacher_server.backends import grammar, internlm
from teacher_server.backends.base import ModelFacts
from teacher_server.backends.model_folder import fetch, fingerprint
from teacher_server.backends.stepper import ModelStepper
from teacher_server.backends.writing import end_ids, writes_as_it_scores
from teacher_server.config import GenerationConfig
from teacher_server.config import TransformersBackend as Config
from teacher_server.errors import ServerConfigError
from teacher_server.generation import OnThread, SteppedGeneration
from teacher_server.signals import output, state
from teacher_wire.errors import CapabilityError
from teacher_wire.identity import head_sha256, text_sha256, tokenizer_sha256
from teacher_wire.messages import (
    HeadHeader,
    SignalSpec,
    TeacherHead,
    TeacherSignals,
    Tensor,
    Timing,
    TokenBatch,
    token_id_dtype,
)

_PROBE_TOKENS = 16
# Largest relative difference between head(state) and the model's own logits on a probe, by dtype.
_PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class _Head:
    """The output projection with what an architecture does to logits afterwards (algorithms.md 3.1)."""

    weight_VD: Torch
    bias_V: Torch | None
    logit_scale: float
    final_softcap: float

    def logits(self, hidden_CD: Torch, vocab_rows: int) -> Torch:
        """[C, V] in the model's dtype."""
        bias = None if self.bias_V is None else self.bias_V[:vocab_rows]
        logits_CV = nn.functional.linear(hidden_CD, self.weight_VD[:vocab_rows], bias)
        if self.logit_scale != 1.0:
            logits_CV = logits_CV * self.logit_scale
        if self.final_softcap:
            logits_CV = torch.tanh(logits_CV / self.final_softcap) * self.final_softcap
        return logits_CV


def load(config: Config, *, deterministic: bool) -> TransformersModel:
    """Loads model and tokenizer.

    Raises:
        ServerConfigError: missing folder, unknown architecture, remote code needed, no tokenizer, no such device.
    """
    folder = fetch(config.model, config.revision)
    device = _device(config.device)
    torch.set_num_threads(config.threads)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    dtype = getattr(torch, config.dtype)
    internlm.register()
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ServerConfigError(
            f"model {config.model!r} cannot be loaded: {' '.join(str(error).split())[:400]}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ServerConfigError(
            f"model {config.model!r} has no fast tokenizer (tokenizer.json), which the handshake needs"
        )
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would start these at random and only warn
        raise ServerConfigError(f"model {config.model!r} lacks {len(absent)} weights, {absent[0]} first")
    model = model.to(device).eval().requires_grad_(False)
    return TransformersModel(config, model, model_config, tokenizer, fingerprint(folder, config.dtype))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ServerConfigError(f"device {name} is not there: torch sees no CUDA")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ServerConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from error


class TransformersModel:
    """A loaded model; see `backends.base.Backend`."""

    def __init__(self, config: Config, model: Any, model_config: Any, tokenizer: Any, digest: str) -> None:
        self._config = config
        self._body = model.get_decoder()
        self._device = next(model.parameters()).device
        projection = model.get_output_embeddings()
        if projection is None:
            raise ServerConfigError(f"model {config.model!r} has no output head")
        text = model_config.get_text_config()
        self._head = _Head(projection.weight, getattr(projection, "bias", None), _logit_scale(text), _softcap(text))
        self._probe(model)
        self._tokenizer = tokenizer
        self._end_ids = end_ids(model, tokenizer)
        rows, columns = projection.weight.shape
        served_head = self.head() if config.serve_head else None
        self._facts = ModelFacts(
            model=config.model,
            fingerprint=digest,
            architecture=type(model).__name__,
            dtype=config.dtype,
            vocab_rows=rows,
            tokenizer_size=len(tokenizer),
            tokenizer_sha256=tokenizer_sha256(tokenizer.backend_tokenizer.to_str()),
            chat_template_sha256=text_sha256(tokenizer.chat_template),
            hidden_size=columns,
            layers=text.num_hidden_layers,
            head_sha256=served_head.header.sha256 if served_head else "",
            transports=("top_k", "hidden", "full") if served_head else ("top_k", "full"),
            max_sequence_tokens=int(getattr(text, "max_position_embeddings", 1 << 20)),
            generates=self._generates(min(rows, len(tokenizer))),
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def _generates(self, vocab_rows: int) -> tuple[str, ...]:
        """What Generate can offer: nothing if the model does not write step by step what it scores at once."""
        if not writes_as_it_scores(self._stepper(vocab_rows, None), self._body, self._device, vocab_rows):
            return ()
        return ("tokens", "json_schema") if grammar.available() else ("tokens",)

    def _stepper(self, vocab_rows: int, grammars: grammar.Grammars | None) -> ModelStepper:
        return ModelStepper(
            self._body, lambda state_bD: self._head.logits(state_bD, vocab_rows), self._device,
            vocab_rows=vocab_rows, end_ids=self._end_ids, grammars=grammars,
            prefill_tokens=self._config_tokens, logit_bytes=self._config.reduce_mb << 20,
        )  # fmt: skip

    def generation(self, config: GenerationConfig, on_thread: OnThread, *, deterministic: bool) -> SteppedGeneration:
        vocab_rows = min(self._facts.vocab_rows, self._facts.tokenizer_size)
        grammars = None
        if "json_schema" in self._facts.generates:
            grammars = grammar.Grammars(self._tokenizer, vocab_rows, self._end_ids)
        return SteppedGeneration(self._stepper(vocab_rows, grammars), config, on_thread, exclusive=deterministic)

    def head(self) -> TeacherHead:
        if not self._config.serve_head:
            raise CapabilityError("this teacher does not serve its output head", field="head", value=self._config.model)
        weight = _to_host(self._head.weight_VD)
        bias = None if self._head.bias_V is None else _to_host(self._head.bias_V)
        scale, softcap = self._head.logit_scale, self._head.final_softcap
        digest = head_sha256(weight, bias, scale, softcap)
        rows, columns = weight.shape
        return TeacherHead(HeadHeader(weight.dtype, rows, columns, bias, scale, softcap, digest), weight)

    @torch.inference_mode()
    def score(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> list[TeacherSignals]:
        started = time.perf_counter()
        states = self._states([batch for batch, _ in jobs])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        forwarded = time.perf_counter()
        answers = [self._reduce(hidden_ND, batch, spec) for hidden_ND, (batch, spec) in zip(states, jobs, strict=True)]
        timing = Timing(
            forward_us=round((forwarded - started) * 1e6),
            reduce_us=round((time.perf_counter() - forwarded) * 1e6),
            batch_tokens=sum(batch.tokens for batch, _ in jobs),
        )
        return [replace(answer, timing=timing) for answer in answers]

    def _states(self, batches: list[TokenBatch]) -> list[Torch]:
        """The wanted rows' states [N, D] of each batch, after the final norm."""
        sequences = [(b, s) for b, batch in enumerate(batches) for s in range(batch.sequences)]
        lengths = np.array([batches[b].lengths_B[s] for b, s in sequences])
        found: dict[tuple[int, int], Torch] = {}
        for group in _groups(lengths, self._config_tokens):
            padded = int(lengths[group].max())
            ids_bL = torch.zeros(len(group), padded, dtype=torch.long)
            for row, index in enumerate(group):
                ids_bL[row, : lengths[index]] = torch.from_numpy(_tokens_of(batches, sequences[index]).astype(np.int64))
            mask_bL = torch.arange(padded)[None, :] < torch.from_numpy(lengths[group])[:, None]
            state_bLD = self._body(
                input_ids=ids_bL.to(self._device), attention_mask=mask_bL.long().to(self._device), use_cache=False
            ).last_hidden_state
            for row, index in enumerate(group):
                wanted = np.flatnonzero(_wanted_of(batches, sequences[index]))
                found[sequences[index]] = state_bLD[row, torch.from_numpy(wanted).to(self._device)]
        return [torch.cat([found[b, s] for s in range(batch.sequences)]) for b, batch in enumerate(batches)]

    @property
    def _config_tokens(self) -> int:
        """Padded tokens of one forward pass; attention and FFN activations grow with it."""
        return 65_536 if self._device.type == "cuda" else 16_384

    def _reduce(self, hidden_ND: Torch, batch: TokenBatch, spec: SignalSpec) -> TeacherSignals:
        labels_N = torch.from_numpy(batch.labels_N().astype(np.int64)).to(self._device)
        extra_NM = None
        if batch.extra_ids_NM is not None:
            extra_NM = torch.from_numpy(batch.extra_ids_NM.astype(np.int64)).to(self._device)
        parts: dict[str, list[Torch]] = {}
        if spec.compression == "int8":
            packed = state.pack(hidden_ND)
            parts["state_int8_ND"], parts["state_scales_NG"] = [packed.int8_CD], [packed.scales_CG]
            parts["outlier_ids_NO"], parts["outlier_values_NO"] = [packed.outlier_ids_CO], [packed.outlier_values_CO]
            hidden_ND = packed.unpack(hidden_ND.dtype)  # lse and logp(label) are of the state that travels
        for rows in self._chunks(hidden_ND.shape[0], spec.vocab_rows):
            logits_CV = self._head.logits(hidden_ND[rows], spec.vocab_rows)
            lse_C, label_C = output.lse_and_label(logits_CV, labels_N[rows])
            found = {"lse_N": lse_C, "label_logp_N": label_C}
            if spec.transport == "top_k":
                extra_CM = None if extra_NM is None else extra_NM[rows]
                ids_CK, values_CK, tail_C = output.top_k(logits_CV, lse_C, spec.k, extra_CM)
                found |= {"topk_ids_NK": ids_CK, "topk_logits_NK": values_CK, "tail_logp_N": tail_C}
            elif spec.transport == "full":
                found["logits_NV"] = logits_CV
            for name, part in found.items():
                parts.setdefault(name, []).append(part)
        if spec.transport == "hidden" and spec.compression == "none":
            parts["hidden_ND"] = [hidden_ND]
        tensors = {name: _to_host(torch.cat(pieces), _ids_below(name, spec)) for name, pieces in parts.items()}
        return TeacherSignals.of(tensors, self._facts.fingerprint)

    def _chunks(self, rows: int, vocab_rows: int) -> Iterator[slice]:
        """Slices whose float32 logits stay under the configured bound."""
        step = max(1, (self._config.reduce_mb << 20) // (4 * vocab_rows))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    @torch.inference_mode()
    def _probe(self, model: Any) -> None:
        """Refuses a model whose logits are not head(state): labels by `hidden` would be wrong.

        Raises:
            ServerConfigError: with the difference found.
        """
        rows = self._head.weight_VD.shape[0]
        ids_1L = (torch.arange(_PROBE_TOKENS) * 7919 % rows)[None].to(self._device)
        own = model(input_ids=ids_1L, use_cache=False).logits[0].float()
        ours = self._head.logits(self._body(input_ids=ids_1L, use_cache=False).last_hidden_state[0], rows).float()
        difference = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-6))
        tolerance = _PROBE_TOLERANCE[self._config.dtype]
        if not difference <= tolerance:
            raise ServerConfigError(
                f"model {self._config.model!r}: its logits are not its head applied to its last hidden state "
                f"(relative difference {difference:.2g}, tolerance {tolerance:g}); this architecture is not supported yet"
            )


def _ids_below(name: str, spec: SignalSpec) -> int:
    """The bound of an id tensor: channels of a state, or tokens."""
    return 1 << 16 if name == "outlier_ids_NO" else spec.vocab_rows


def _tokens_of(batches: list[TokenBatch], sequence: tuple[int, int]) -> np.ndarray:
    batch = batches[sequence[0]]
    return batch.token_ids_T[batch.cu_lengths_B1[sequence[1]] : batch.cu_lengths_B1[sequence[1] + 1]]


def _wanted_of(batches: list[TokenBatch], sequence: tuple[int, int]) -> np.ndarray:
    batch = batches[sequence[0]]
    return batch.wanted_T[batch.cu_lengths_B1[sequence[1]] : batch.cu_lengths_B1[sequence[1] + 1]]


def _groups(lengths: np.ndarray, max_padded_tokens: int) -> Iterator[np.ndarray]:
    """Indices of sequences to run together: neighbours in length, at most 25 % padding, under the budget.

    A pure function of the lengths, so that the same request is always cut the same way.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order):
            longest = lengths[order[start]]
            fits = longest * (end - start + 1) <= max_padded_tokens
            if fits and lengths[order[end]] >= 0.75 * longest:
                continue
        yield order[start:end]
        start = end


def _to_host(tensor: Torch, vocab_rows: int = 0) -> Tensor:
    """A device tensor as a wire tensor; integer tensors are token ids below `vocab_rows`."""
    host = tensor.detach().to("cpu").contiguous()
    if host.dtype == torch.bfloat16:
        return Tensor("bfloat16", host.view(torch.int16).numpy().view(np.uint16))
    if host.dtype == torch.int64:
        name = token_id_dtype(vocab_rows)
        return Tensor(name, host.numpy().astype(np.uint16 if name == "uint16" else np.uint32))
    return Tensor(str(host.dtype).removeprefix("torch."), host.numpy())


def _logit_scale(config: Any) -> float:
    """The factor an architecture multiplies logits with: Cohere `logit_scale`, Granite `logits_scaling` (a divisor)."""
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _softcap(config: Any) -> float:
    return float(getattr(config, "final_logit_softcapping", None) or 0.0)
