"""Any causal language model that transformers loads, as a teacher.

In: packed tokens of several requests; out: reduced signals on the host. The states of all wanted rows come from a
`bodies.Body`, the signals of all requests that ask for the same from one `reduce`, and one wait a batch is enough.
With `deterministic`, every sequence is forwarded and reduced by itself: its labels are a function of the weights, the
spec and its own tokens, whatever else is in the batch and whichever of its rows are wanted.
Axes: N wanted rows, L tokens of a sequence, M named ids, V vocabulary, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor as Torch
from transformers import AutoConfig, AutoModelForCausalLM

from teacher_server.backends import grammar, internlm, logits, lora
from teacher_server.backends.base import ModelFacts
from teacher_server.backends.head import Head, offered
from teacher_server.backends.model_folder import find, fingerprint, refusals_of
from teacher_server.backends.stopwatch import Stopwatch
from teacher_server.backends.tokenizer import load_tokenizer, tokenizer_identity
from teacher_server.backends.transformers import decoder_runners, quantized
from teacher_server.backends.transformers import groups as grouping
from teacher_server.backends.transformers.capture import calibration, hooks, probe
from teacher_server.backends.transformers.capture.taps import captured_numbers
from teacher_server.backends.transformers.decode_loop import ModelStepper
from teacher_server.backends.transformers.generation_probe import end_ids, writes_as_it_scores
from teacher_server.backends.transformers.groups import Asked, Group, Job, cuts_of, groups_of, sequences_of, wanted_of
from teacher_server.config.backends import TransformersBackend as Config
from teacher_server.config.features import FeaturesConfig
from teacher_server.config.server import GenerationConfig
from teacher_server.decoding.scheduler import OnThread, SteppedGeneration
from teacher_server.errors import ServerConfigError
from teacher_server.signals.base import Rows
from teacher_server.signals.captured import Captured, Wish, union
from teacher_server.signals.features.basis import Projection, projections
from teacher_server.signals.reduce import reduce, wish_of
from teacher_server.signals.transfer import HostRows, to_device, to_wire
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.axes import Entries
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.signals import AnswerShape, SignalSpec, TeacherSignals, Timing

log = logging.getLogger(__name__)

_CAPTURE_BYTES = {"cuda": 4 << 30, "cpu": 512 << 20}  # of values from inside a pass, held at a time
_PREFILL_TOKENS = {"cuda": 65_536, "cpu": 16_384}  # padded tokens of one forward pass over new prompts


def load(config: Config, *, deterministic: bool) -> TransformersModel:
    """Loads model and tokenizer.

    Raises:
        ServerConfigError: missing folder, unknown architecture, remote code needed, no tokenizer, no such device.
    """
    files = find(config.model, config.revision)
    device = _device(config.device)
    torch.set_num_threads(config.threads)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module property
        torch.backends.cudnn.benchmark = False
    dtype = getattr(torch, config.dtype)
    internlm.register()
    with refusals_of(config.model):
        model_config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=dtype,
            attn_implementation=_attention(config, model_config),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = load_tokenizer(files.tokenizer, config.model)
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would start these at random and only warn
        raise ServerConfigError(f"model {config.model!r} lacks {len(absent)} weights, {absent[0]} first")
    if files.adapter is not None:
        lora.merge(model, files.adapter)
        log.info("model %s is an adapter of %s, merged into it", config.model, files.folder)
    model = model.to(device).eval().requires_grad_(False)
    arithmetic = config.dtype if config.quantization == "none" else f"{config.dtype}+{config.quantization}"
    if _softcap(model_config):  # earlier labels of such a model were made without it
        arithmetic += "+softcap"
    digest = fingerprint(files.folder, arithmetic, files.adapter)
    return TransformersModel(config, model, model_config, tokenizer, digest, deterministic=deterministic)


def _softcap(model_config: Any) -> float:
    """c of attention scores c tanh(x / c); 0 for none."""
    return getattr(model_config.get_text_config(), "attn_logit_softcapping", None) or 0.0


def _attention(config: Config, model_config: Any) -> str:
    """transformers' attn_implementation.

    Raises:
        ServerConfigError: one that would leave out what the model does to its attention scores.
    """
    if not _softcap(model_config):
        return "sdpa" if config.attention == "auto" else config.attention
    if config.attention == "sdpa":
        raise ServerConfigError(
            f"model {config.model!r} caps its attention scores (attn_logit_softcapping={_softcap(model_config)}), which attention sdpa leaves "
            "out: its labels would be another model's; set attention to auto or eager"
        )
    return "eager" if config.attention == "auto" else config.attention


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
    """A loaded model; see `backends.base.Backend`.

    Attributes:
        label_error: of a quantized model's labels, else None.
    """

    def __init__(
        self, config: Config, model: Any, model_config: Any, tokenizer: Any, digest: str, *, deterministic: bool
    ) -> None:
        self._config = config
        self._device = next(model.parameters()).device
        self._deterministic = deterministic
        self._chunk_bytes = (config.reduce_mb or (1280 if self._device.type == "cuda" else 64)) << 20
        projection = model.get_output_embeddings()
        if projection is None:
            raise ServerConfigError(f"model {config.model!r} has no output head")
        self._capture_bytes = _CAPTURE_BYTES[self._device.type]
        text, transform = model_config.get_text_config(), logits.transform_of(model_config)
        self._text = text
        self._head = Head(projection.weight, getattr(projection, "bias", None), transform.scale, transform.cap)
        self._probe(model)
        alone = {"prefix_min_tokens": 0} if deterministic else {}
        with torch.inference_mode():
            self._body = decoder_runners.choose(model, config.model_copy(update=alone))
            captures = probe.captures(logits.body_of(model), self._body, config)  # before float8, as all other probes
            self.label_error = self._quantize(tokenizer) if config.quantization == "fp8" else None
        log.info("model %s is run %s", config.model, self._body.name)
        self._decoder = logits.body_of(model)
        self.tokenizer, self._end_ids = tokenizer, end_ids(model, tokenizer)
        rows, columns = projection.weight.shape
        artifacts, transports = offered(self._head, config.serve_head, captures)
        width = hooks.kv_width(self._decoder) if "relation" in transports else 0
        self._basis: Artifact | None = None
        self._projections: Mapping[int, Projection] = {}
        self._facts = ModelFacts(
            model=config.model,
            fingerprint=digest,
            architecture=type(model).__name__,
            dtype=config.dtype,
            vocab_rows=rows,
            tokenizer_size=len(tokenizer),
            **tokenizer_identity(tokenizer),
            hidden_size=columns,
            layers=text.num_hidden_layers,
            artifacts=artifacts,
            transports=tuple(kind for kind in transports if kind != "relation" or width),
            max_sequence_tokens=logits.position_limit(model_config),
            generates=self._generates(min(rows, len(tokenizer))),
            kv_width=width,
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the layers so far; less than was asked where prefixes are shared."""
        return self._body.computed_tokens

    def _generates(self, vocab_rows: int) -> tuple[str, ...]:
        """What Generate can offer: nothing if the model does not write step by step what it scores at once."""
        if self._config.quantization == "fp8":  # the layers that write keep their own weights
            return ()
        if not writes_as_it_scores(self._stepper(vocab_rows, None), self._decoder, self._device, vocab_rows):
            return ()
        return ("tokens", "json_schema") if grammar.available() else ("tokens",)

    def _stepper(self, vocab_rows: int, grammars: grammar.Grammars | None) -> ModelStepper:
        return ModelStepper(
            self._decoder, lambda state_bD: self._head.logits(state_bD, vocab_rows), self._device,
            vocab_rows=vocab_rows, end_ids=self._end_ids, grammars=grammars,
            prefill_tokens=_PREFILL_TOKENS[self._device.type], logit_bytes=self._chunk_bytes,
        )  # fmt: skip

    def generation(self, config: GenerationConfig, on_thread: OnThread, *, deterministic: bool) -> SteppedGeneration:
        vocab_rows = min(self._facts.vocab_rows, self._facts.tokenizer_size)
        grammars = None
        if "json_schema" in self._facts.generates:
            grammars = grammar.Grammars(self.tokenizer, vocab_rows, self._end_ids)
        return SteppedGeneration(self._stepper(vocab_rows, grammars), config, on_thread, exclusive=deterministic)

    def artifact(self, wanted: ArtifactInfo) -> Artifact:
        return self._basis if self._basis is not None and wanted == self._basis.info else self._head.artifact()

    def calibrate(self, features: FeaturesConfig) -> None:
        self._basis, self._facts = calibration.calibrated(features, self._facts, self._body, self.tokenizer)
        self._projections = projections(LayerBasis.of(self._basis), self._device)

    def score(self, jobs: list[Job]) -> list[TeacherSignals]:
        return self.begin(jobs)()

    def begin(self, jobs: list[Job]) -> Callable[[], list[TeacherSignals]]:
        """Puts a batch to the device and returns at once there; what it returns waits for the answers.

        The next batch may begin before the last one is waited for, from the same thread; the wait may be in another.
        """
        each = self._begin(jobs, apart=False)

        def finish() -> list[TeacherSignals]:
            found: dict[int, TeacherSignals] = {}
            timing = Timing()
            for index, signals in each():
                found[index], timing = signals, signals.timing
            return [replace(found[index], timing=timing) for index in range(len(jobs))]

        return finish

    def begin_each(self, jobs: list[Job]) -> Callable[[], Iterator[tuple[int, TeacherSignals]]]:
        """See `backends.base.EachBackend`: one pass for all, but each job's rows are reduced and copied by themselves."""
        return self._begin(jobs, apart=True)

    @torch.inference_mode()
    def _begin(self, jobs: list[Job], *, apart: bool) -> Callable[[], Iterator[tuple[int, TeacherSignals]]]:
        watch = Stopwatch(self._device)
        compute = self._apart if self._deterministic else self._together
        copies = compute(jobs, grouping.members_of(jobs, apart=apart), watch)
        return lambda: self._answers(jobs, copies, watch)

    def _together(
        self, jobs: list[Job], groups: grouping.Members, watch: Stopwatch
    ) -> list[tuple[list[int], HostRows]]:
        """The signals of each group of jobs, from as few passes as fit; what a cut captures is gone before the next."""
        together = groups_of(jobs, groups)
        order = [index for group in together for index in group.members]
        sequences = [ids for index in order for ids in sequences_of(jobs[index][0])]
        rows = [np.flatnonzero(wanted) for index in order for wanted in wanted_of(jobs[index][0])]
        answers = [self._host_rows(group.spec, [jobs[index][0] for index in group.members]) for group in together]
        wishes = [wish_of(group.spec) for group in together]
        wish = union(wishes)
        token_bytes = captured_numbers(self._text, wish) * self._head.weight_VD.element_size() if wish else 0
        for cut in cuts_of(sequences, token_bytes, self._capture_bytes):
            states = self._body.run(sequences[cut], rows[cut], wish)
            watch.mark("forward")
            self._reduce_cut(cut, *states, together, wishes, answers)
            del states  # what was captured is gone before the next cut
            watch.mark("reduce")
        return [(group.members, into) for group, into in zip(together, answers, strict=True)]

    def _reduce_cut(
        self, cut: slice, hidden_ND: Torch, captured: Captured, groups: list[Group], wishes: list[Wish], answers: list[HostRows]
    ) -> None:  # fmt: skip
        """Reduces each group's rows of the cut; a group's answer ends with its last sequence."""
        start = 0
        for group, wish, into in zip(groups, wishes, answers, strict=True):
            sequences, rows = group.within(cut)
            stop = start + rows.stop - rows.start
            if stop > start:
                part = captured.part(sequences, wish) if wish else None
                self._reduce(into, group.spec, hidden_ND[start:stop], group.asked.part(rows), part)
            if cut.start < group.last <= cut.stop:
                into.end()
            start = stop

    def _apart(self, jobs: list[Job], groups: grouping.Members, watch: Stopwatch) -> list[tuple[list[int], HostRows]]:
        """The same, each sequence by itself; all its rows are reduced in chunks from its first, wanted or not."""
        found = []
        for spec, members in groups:
            wish = wish_of(spec)
            rows_of = self._host_rows(spec, [jobs[index][0] for index in members])
            for batch in (jobs[index][0] for index in members):
                named_at = 0
                checked_T = np.zeros(batch.tokens, np.bool_)
                if spec.check == "sampled":
                    checked_T[batch.rows_of()] = checked_rows(batch)
                checked = np.split(checked_T, batch.cu_lengths_B1[1:-1])
                for ids_L, wanted_L, checked_L in zip(sequences_of(batch), wanted_of(batch), checked, strict=True):
                    kept_R = wanted_L[:-1]
                    if not kept_R.any():
                        continue
                    hidden_RD, captured = self._body.run([ids_L], [np.arange(len(kept_R))], wish)
                    watch.mark("forward")
                    named_RM = None
                    if batch.extra_ids_NM is not None:
                        named_RM = np.zeros((len(kept_R), batch.extra_ids_NM.shape[1]), np.int32)
                        named_RM[kept_R] = batch.extra_ids_NM[named_at : named_at + int(kept_R.sum())]
                        named_at += int(kept_R.sum())
                    labels_R = np.where(kept_R, ids_L[1:], 0)  # others' may lie outside the spec's vocabulary
                    checked_R = checked_L[:-1] if spec.check == "sampled" else None
                    asked = Asked(labels_R, named_RM, kept_R=kept_R, checked_R=checked_R)
                    self._reduce(rows_of, spec, hidden_RD, asked, captured if wish else None)
                    watch.mark("reduce")
            found.append((members, rows_of.end()))
        return found

    def _reduce(
        self, into: HostRows, spec: SignalSpec, hidden_RD: Torch, asked: Asked, captured: Captured | None
    ) -> None:
        labels_R = to_device(asked.labels_R, self._device).long()
        named_RM = None if asked.extra_RM is None else to_device(asked.extra_RM, self._device).long()
        about = (asked.sequence_R, asked.kept_R, asked.checked_R)
        rows = Rows(hidden_RD, labels_R, named_RM, *about, captured, self._projections)
        reduce(self._head, rows, spec, self._chunk_bytes, into)

    def _host_rows(self, spec: SignalSpec, batches: list[TokenBatch]) -> HostRows:
        """Room on the host for one answer about several batches."""
        axes = {part.axis for part in spec.fields(self._shape(spec))}
        return HostRows(Entries.totals(batches, axes), self._chunk_bytes)

    def _shape(self, spec: SignalSpec) -> AnswerShape:
        facts = self._facts
        return AnswerShape(spec.vocab_rows, facts.hidden_size, facts.dtype, facts.kv_width)

    def _answers(
        self, jobs: list[Job], copies: list[tuple[list[int], HostRows]], watch: Stopwatch
    ) -> Iterator[tuple[int, TeacherSignals]]:
        """Each job's answer once it is on the host; those of the last group have the times of the batch."""
        timing = Timing(batch_tokens=sum(batch.tokens for batch, _ in jobs))
        for number, (members, copy) in enumerate(copies, 1):
            spec = jobs[members[0]][1]
            types = {part.name: part.dtype for part in spec.fields(self._shape(spec))}
            tensors = {name: to_wire(host, types[name]) for name, host in copy.wait().items()}
            together = TeacherSignals(tensors, self._facts.fingerprint)
            if number == len(copies):
                spent = watch.us()
                timing = replace(timing, forward_us=spent.get("forward", 0), reduce_us=spent.get("reduce", 0))
            for index, answer in zip(members, together.divide([jobs[index][0] for index in members]), strict=True):
                yield index, replace(answer, timing=timing)

    def _quantize(self, tokenizer: Any) -> quantized.LabelError:
        """Turns the layers' products to float8 and measures what that does to the labels.

        Raises:
            ServerConfigError: not a model or a device that can.
        """
        why = ""
        if self._device.type != "cuda" or torch.cuda.get_device_capability(self._device) < (8, 9):
            why = f"device {self._device} multiplies no float8"
        elif self._config.dtype != "bfloat16":
            why = f"dtype {self._config.dtype} must be bfloat16"
        elif not isinstance(self._body, decoder_runners.PackedBody) or self._body.fused is None:
            why = f"the model is run {self._body.name}, not fused"
        if why:
            raise ServerConfigError(f"model {self._config.model!r}: quantization fp8 is not possible: {why}")
        assert isinstance(self._body, decoder_runners.PackedBody) and self._body.fused is not None
        sequences = quantized.probe_text(tokenizer, self._head.weight_VD.shape[0])
        rows = [np.arange(len(ids)) for ids in sequences]
        before_ND = self._body.states(sequences, rows)
        self._body.fused.quantize()
        error = quantized.label_error(self._head, before_ND, self._body.states(sequences, rows))
        log.warning("model %s in float8 against bfloat16: %s", self._config.model, error)
        return error

    @torch.inference_mode()
    def _probe(self, model: Any) -> None:
        """Refuses a model whose logits are not head(state): labels by `hidden` would be wrong.

        Raises:
            ServerConfigError: with the difference found.
        """
        rows = self._head.weight_VD.shape[0]
        kind = f"model {self._config.model!r} ({type(model).__name__})"
        embedded = getattr(model.get_input_embeddings(), "weight", self._head.weight_VD).shape[0]
        ids_BL = logits.probe_ids(min(rows, embedded)).to(self._device)
        try:
            own_BLV = model(input_ids=ids_BL, use_cache=False).logits
            state_BLD = logits.body_of(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
            ours_BLV = self._head.logits(state_BLD, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's own code, which raises what it likes
            raise ServerConfigError(
                f"{kind} cannot be asked for logits and states by token ids alone: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}; this architecture is not supported"
            ) from error
        said = logits.disagreement(own_BLV, ours_BLV, state_BLD, self._config.dtype)
        if said:
            raise ServerConfigError(f"{kind}: {said}; this architecture is not supported, its labels would be wrong")
