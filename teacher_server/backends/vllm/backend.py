"""A causal language model that vLLM runs: labels from exact final states, and writing in vLLM's running batches.

In: packed tokens of several requests, or prompts; out: signals on the host, or samples. Labels are states by vLLM's pooling
runner, reduced by our own head: never `prompt_logprobs`, whose [tokens x vocabulary] buffer no engine's memory plan counts.
Axes: T tokens of a sequence, N wanted rows, V vocabulary, D width.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig

from teacher_server.backends import grammar, internlm
from teacher_server.backends.base import ModelFacts
from teacher_server.backends.head import Head, label_logp, load_head, offered, reduce
from teacher_server.backends.model_folder import find, fingerprint, refusals_of
from teacher_server.backends.tokenizer import load_tokenizer, tokenizer_identity
from teacher_server.backends.vllm.architectures import check_known
from teacher_server.backends.vllm.states import StatesUnderWay
from teacher_server.backends.vllm.writing import EngineGeneration, Writer, refuse_sampling, sample_seed
from teacher_server.config.backends import VllmBackend as Config
from teacher_server.config.server import GenerationConfig
from teacher_server.decoding.scheduler import OnThread
from teacher_server.decoding.sequence_queue import Sequence
from teacher_server.errors import ServerConfigError
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CapabilityError, LimitError, RequestError, TeacherWireError
from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.signals import AnswerShape, SignalSpec, TeacherSignals, Timing
from teacher_wire.generate.messages import Sample, SamplingSpec

if TYPE_CHECKING:
    from teacher_server.backends.vllm.engine import Engine, Loop

_PROBE_TOKENS = 16
_PROBE_WRITTEN = 4
# Nats between the log-probability that one engine writes with and the other scores with.
_PROBE_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
_CPU_CACHE_GB = 1.0


def load(config: Config, *, deterministic: bool, overrides: dict[str, Any] | None = None) -> VllmModel:
    """Starts one vLLM engine a role.

    Args:
        config: what to run.
        deterministic: an engine runs one sequence at a time and reuses nothing, so that equal requests get equal bits.
        overrides: of vLLM's EngineArgs, for benches.

    Raises:
        ServerConfigError: no vLLM, no such folder, an architecture or a memory budget that vLLM cannot serve.
    """
    folder = _whole_model(config)
    internlm.register()
    with refusals_of(config.model):
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(folder, config.model)
    names = getattr(model_config, "architectures", None) or [f"model_type {model_config.model_type}"]
    check_known(config.model, names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.threads)
    head = load_head(folder, model_config, getattr(torch, config.dtype), device)
    with _environment(config):
        try:
            from teacher_server.backends.vllm import engine as vllm_engine
        except ImportError as error:
            raise ServerConfigError(f"backend vllm: vLLM cannot be imported ({error}); make setup-vllm") from error
        arguments = _arguments(config, folder, device, deterministic=deterministic) | (overrides or {})
        loop = vllm_engine.Loop()
        engines: dict[str, Engine] = {}
        try:
            for role in config.roles:
                whole = _whole_prompts(arguments, model_config) if (role, device.type) == ("generate", "cpu") else {}
                engines[role] = vllm_engine.start(role, loop, arguments | whole)
        except BaseException:
            _close(engines, loop)
            raise
    return VllmModel(config, folder, model_config, tokenizer, head, engines, loop)


def _whole_model(config: Config) -> Path:
    files = find(config.model, config.revision)
    if files.adapter is not None:
        raise ServerConfigError(
            f"model {config.model!r} is an adapter of {str(files.folder)!r}, which backend vllm does not merge; use the transformers "
            "backend, or merge it with peft (merge_and_unload) and serve the result"
        )
    return files.folder


def _arguments(config: Config, folder: Path, device: torch.device, *, deterministic: bool) -> dict[str, Any]:
    """vLLM's EngineArgs that both roles share."""
    cache_gb = config.kv_cache_gb or (None if device.type == "cuda" else _CPU_CACHE_GB)
    many = config.tensor_parallel_size > 1
    return {
        "model": str(folder),
        "tokenizer": str(folder),
        "trust_remote_code": False,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "gpu_memory_utilization": config.gpu_memory_utilization / len(config.roles),
        "kv_cache_memory_bytes": None if cache_gb is None else int(cache_gb * (1 << 30)),
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "mp" if many else None,  # inside a Ray actor vLLM would ask Ray for more
        "enable_prefix_caching": config.prefix_caching and not deterministic,
        "max_num_batched_tokens": config.max_batch_tokens,
        "max_num_seqs": 1 if deterministic else config.max_sequences,
        "enforce_eager": config.enforce_eager,
        "disable_log_stats": True,
        "seed": 0,
    }


def _whole_prompts(arguments: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """EngineArgs that keep a prompt in one forward pass.

    On a CPU an engine dies of a seeded prompt that it computes in parts: after each part it sets back the sample's random
    generator, which torch can do on CUDA alone (vLLM 0.32, `_bookkeeping_sync`).
    """
    longest = arguments["max_model_len"] or model_config.get_text_config().max_position_embeddings
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(arguments["max_num_batched_tokens"], longest),
    }


@contextlib.contextmanager
def _environment(config: Config) -> Iterator[None]:
    """What vLLM reads while its processes start; afterwards this process's variables are as they were."""
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.threads),
    }
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _close(engines: dict[str, Engine], loop: Loop) -> None:
    for engine in engines.values():
        engine.close()
    loop.close()


class VllmModel:
    """A loaded model; see `backends.base.WritingBackend`."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        model_config: Any,
        tokenizer: Any,
        head: Head,
        engines: dict[str, Engine],
        loop: Loop,
    ) -> None:
        self._config = config
        self.tokenizer = tokenizer
        self._head = head
        self._engines = engines
        self._loop = loop
        self._reduce_bytes = (config.reduce_mb or (640 if head.weight_VD.is_cuda else 64)) << 20
        try:
            self._probe()
        except BaseException:
            self.close()
            raise
        text = model_config.get_text_config()
        rows, columns = head.weight_VD.shape
        artifacts, transports = offered(head, config.serve_head) if "score" in engines else ((), ())
        self._facts = ModelFacts(
            model=config.model,
            # Labels of two backends differ by rounding: they are two teachers to caches and to runs that resume.
            fingerprint=fingerprint(folder, f"{config.dtype} vllm"),
            architecture=model_config.architectures[0],
            dtype=config.dtype,
            vocab_rows=rows,
            tokenizer_size=len(tokenizer),
            **tokenizer_identity(tokenizer),
            hidden_size=columns,
            layers=text.num_hidden_layers,
            artifacts=artifacts,
            transports=transports,
            max_sequence_tokens=min(engine.max_model_len for engine in engines.values()),
            generates=self._generates(),
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def _generates(self) -> tuple[str, ...]:
        if "generate" not in self._engines:
            return ()
        return ("tokens", "json_schema") if "score" in self._engines else ("tokens",)

    def artifact(self, wanted: ArtifactInfo) -> Artifact:
        return self._head.artifact()

    # ------------------------------------------------------------------ score

    def score(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> list[TeacherSignals]:
        return self.begin(jobs)()

    def begin(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> Callable[[], list[TeacherSignals]]:
        """Puts a batch into vLLM's queue; what it returns reduces the states as they come, in the thread that calls it.

        So vLLM computes the next batch while the last one travels and is reduced.
        """
        each = self.begin_each(jobs)

        def finish() -> list[TeacherSignals]:
            found: dict[int, TeacherSignals] = {}
            timing = Timing()
            for index, signals in each():
                found[index], timing = signals, signals.timing
            return [replace(found[index], timing=timing) for index in range(len(jobs))]

        return finish

    def begin_each(
        self, jobs: list[tuple[TokenBatch, SignalSpec]]
    ) -> Callable[[], Iterator[tuple[int, TeacherSignals]]]:
        """See `backends.base.EachBackend`."""
        for batch, spec in jobs:
            self._refuse(batch, spec)
        under_way = StatesUnderWay(self._engines["score"], [batch for batch, _ in jobs])
        return lambda: self._answers(jobs, under_way)

    def _answers(
        self, jobs: list[tuple[TokenBatch, SignalSpec]], under_way: StatesUnderWay
    ) -> Iterator[tuple[int, TeacherSignals]]:
        """Each job's answer as its states come; the last one has the times of the batch."""
        tokens, reduced_s, left = sum(batch.tokens for batch, _ in jobs), 0.0, len(jobs)
        for job, hidden_ND in under_way.states(self._head.weight_VD):
            begun = time.perf_counter()
            with torch.inference_mode():
                answer = reduce(self._head, hidden_ND, *jobs[job], self._reduce_bytes)
            reduced_s += time.perf_counter() - begun
            left -= 1
            timing = Timing(batch_tokens=tokens)
            if not left:
                spent_us = (round(under_way.took_s * 1e6), round(reduced_s * 1e6))
                timing = replace(timing, forward_us=spent_us[0], reduce_us=spent_us[1])
            yield job, replace(answer, timing=timing, fingerprint=self._facts.fingerprint)

    def _refuse(self, batch: TokenBatch, spec: SignalSpec) -> None:
        """What vLLM must never see: it is refused here, whoever let it through.

        Raises:
            CapabilityError, LimitError, RequestError: naming field, value and limit.
        """
        facts = self._facts
        for kind in spec.kinds:
            if kind not in facts.transports:
                raise CapabilityError(
                    "this backend does not give this signal",
                    field="signal", value=kind, limit="|".join(facts.transports),
                )  # fmt: skip
        answer_bytes = spec.answer_bytes(batch, AnswerShape(spec.vocab_rows, facts.hidden_size, facts.dtype))
        for field, value, limit in (
            ("vocab_rows", spec.vocab_rows, facts.vocab_rows),
            ("sequence tokens", int(batch.lengths_B.max()), facts.max_sequence_tokens),
            ("answer bytes", answer_bytes, self._config.answer_mb << 20),
        ):
            if value > limit:
                raise LimitError("above the limit of this backend", field=field, value=value, limit=limit)
        for field, ids, below in (
            ("token_ids", batch.token_ids_T, facts.vocab_rows),
            ("labels", batch.labels_N(), spec.vocab_rows),
            ("extra_ids", batch.extra_ids_NM, spec.vocab_rows),
        ):
            if ids is not None and int(ids.max()) >= below:
                raise RequestError("outside the vocabulary", field=field, value=int(ids.max()), limit=below - 1)

    # ---------------------------------------------------------------- writing

    def generation(self, config: GenerationConfig, on_thread: OnThread, *, deterministic: bool) -> EngineGeneration:
        grammars = None
        if "json_schema" in self._facts.generates:
            rows = min(self._facts.vocab_rows, self._facts.tokenizer_size)
            grammars = grammar.Grammars(self.tokenizer, rows, frozenset({self.tokenizer.eos_token_id} - {None}))

        def prepare(spec: SamplingSpec) -> None:
            refuse_sampling(spec)
            if spec.json_schema and grammars is not None:
                grammars.compile(spec.json_schema)  # what cannot be compiled here must not be tried in the engine

        writer = Writer(prepare, self._write, self.check_health, self.counters)
        return EngineGeneration(writer, config, exclusive=deterministic)

    async def _write(self, sequence: Sequence) -> Sample:
        prompt_ids = sequence.prompt_ids.tolist()
        seed = sample_seed(sequence.spec.seed, sequence.index, sequence.prompt_ids)
        written = await asyncio.wrap_future(self._engines["generate"].write_on(prompt_ids, sequence.spec, seed))
        ids_n = np.array(written.token_ids, np.int32)
        if written.token_logp is None:
            loop = asyncio.get_running_loop()
            logp_n = await loop.run_in_executor(None, self._logp, prompt_ids, written.token_ids)
        else:
            logp_n = np.array(written.token_logp, np.float32)
        return Sample(sequence.prompt, sequence.index, ids_n, np.minimum(logp_n, 0.0), written.finish)

    @torch.inference_mode()
    def _logp(self, prompt_ids: list[int], token_ids: list[int]) -> np.ndarray:
        """float32 [n]: log-probability of each token behind the prompt, from the engine that scores."""
        ids = np.array(prompt_ids + token_ids, np.int32)
        wanted = np.zeros(len(ids), np.bool_)
        wanted[len(prompt_ids) - 1 : -1] = True
        batch = TokenBatch(ids, np.array([0, len(ids)], np.int32), wanted)
        ((_, hidden_ND),) = StatesUnderWay(self._engines["score"], [batch]).states(self._head.weight_VD)
        labels_N = torch.tensor(token_ids, device=hidden_ND.device)
        rows = self._head.weight_VD.shape[0]
        return label_logp(self._head, hidden_ND, labels_N, rows, self._reduce_bytes).cpu().numpy()

    # ----------------------------------------------------------------- engine

    def _probe(self) -> None:
        """One request through every engine, and with both the same log-probabilities from both.

        Raises:
            ServerConfigError: an engine died on it, or the two differ.
        """
        rows = self._head.weight_VD.shape[0]
        limit = min(engine.max_model_len for engine in self._engines.values())
        prompt_ids = [i * 7919 % rows for i in range(1, min(_PROBE_TOKENS, limit - _PROBE_WRITTEN) + 1)]
        spec = SamplingSpec(temperature=0.0, max_new_tokens=_PROBE_WRITTEN, ignore_eos=True)
        try:
            written = None
            if "generate" in self._engines:
                written = self._engines["generate"].write_on(prompt_ids, spec, 0).result()
            if "score" in self._engines:
                ids = prompt_ids[1:2] if written is None else written.token_ids
                scored_n = self._logp(prompt_ids, ids)
        except TeacherWireError as error:
            raise ServerConfigError(
                f"model {self._config.model!r}: vLLM's engine fails on its first request: {error.message} "
                "(its own log is above)"
            ) from error
        if written is not None and written.token_logp is not None and "score" in self._engines:
            difference = float(np.abs(scored_n - np.array(written.token_logp)).max())
            tolerance = _PROBE_TOLERANCE[self._config.dtype]
            if not difference <= tolerance:
                raise ServerConfigError(
                    f"model {self._config.model!r}: what vLLM writes with is not its head applied to its last state "
                    f"(difference {difference:.2g} nats, tolerance {tolerance:g}); this architecture is not supported yet"
                )

    def check_health(self) -> None:
        """Raises RuntimeError if an engine is gone."""
        for engine in self._engines.values():
            engine.check_health()

    def counters(self) -> dict[str, int]:
        """Sequences in each engine, by its own scheduler's statistics."""
        return {
            f"vllm_{role}_{name}": getattr(engine.load, name)
            for role, engine in self._engines.items()
            for name in ("running", "waiting")
        }

    def close(self) -> None:
        """Ends all engines."""
        _close(self._engines, self._loop)
