"""vLLM itself: one engine in processes of its own, driven from one event loop in a thread. The only room that imports vllm.

In: token ids; out: states after the final norm, or a written sample. What is refused, died or was taken back becomes one of
our errors here. Works with the interfaces of vLLM 0.25.1 and 0.32.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor as Torch
from vllm import AsyncEngineArgs, PoolingParams, SamplingParams, TokensPrompt
from vllm.config import PoolerConfig, StructuredOutputsConfig
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from teacher_server.backends import death_watch, grammar
from teacher_server.errors import ServerConfigError
from teacher_wire.core.errors import RequestError, ServerError, TeacherWireError, UnavailableError
from teacher_wire.generate.messages import SamplingSpec

Role = Literal["score", "generate"]
Result = TypeVar("Result")
OnState = Callable[[int, "Torch | TeacherWireError"], None]


class Loop:
    """An event loop in a thread, for all engines of a replica."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Runs `work` there; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The same, waited for."""
        return self.submit(work).result()

    def close(self) -> None:
        """Ends the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


@dataclass
class Load:
    """What an engine's own scheduler last said.

    Attributes:
        running, waiting: sequences.
    """

    running: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Written:
    """One finished text; `token_logp` is None where vLLM was not asked for it."""

    token_ids: list[int]
    token_logp: list[float] | None
    finish: Literal["stop", "length"]


class Engine:
    """One engine; `start` makes it.

    Args:
        llm: vLLM's.
        loop: where it lives.
        load: written by its scheduler's statistics.

    Attributes:
        last_states_s: when somebody last had all the states it asked for, by `time.perf_counter`.
    """

    def __init__(self, llm: AsyncLLM, loop: Loop, load: Load) -> None:
        self._llm = llm
        self._loop = loop
        self._numbers = itertools.count()
        processes = llm.engine_core.resources.engine_manager.processes
        self._watch = death_watch.start([process.pid for process in processes])
        self.load = load
        self.last_states_s = 0.0
        self.max_model_len = int(llm.model_config.max_model_len)

    def encode(self, sequences: Sequence[list[int]], on_state: OnState) -> Future[None]:
        """Begins to compute the states of sequences.

        Args:
            sequences: ids.
            on_state: told each sequence's number with its states [T, D] on the host, or with what went wrong, as they come.
        """
        return self._loop.submit(self._encode_all(sequences, on_state))

    async def _encode_all(self, sequences: Sequence[list[int]], on_state: OnState) -> None:
        await asyncio.gather(*(self._encode(number, ids, on_state) for number, ids in enumerate(sequences)))

    async def _encode(self, number: int, ids: list[int], on_state: OnState) -> None:
        # Read from a prefix cache, the states of the cached tokens would be missing.
        params = PoolingParams(task="token_embed", use_activation=False, skip_reading_prefix_cache=True)
        try:
            state_TD = None
            async for answer in self._llm.encode(TokensPrompt(prompt_token_ids=ids), params, self._name()):
                state_TD = answer.outputs.data
            if state_TD is None or len(state_TD) != len(ids):
                came = "none" if state_TD is None else len(state_TD)
                raise ServerError("vLLM gave other rows than tokens", field="states", value=came, limit=len(ids))
            on_state(number, state_TD)
        except Exception as error:
            on_state(number, as_wire_error(error))

    async def write(self, prompt_ids: list[int], spec: SamplingSpec, seed: int) -> Written:
        """One sample; cancelling this aborts it in the engine.

        Raises:
            TeacherWireError: refused, or the engine is gone.
        """
        written = None
        try:
            params = sampling_params(spec, seed)
            async for answer in self._llm.generate(TokensPrompt(prompt_token_ids=prompt_ids), params, self._name()):
                written = answer.outputs[0]
        except Exception as error:
            raise as_wire_error(error) from error
        if written is None or written.finish_reason not in ("stop", "length"):
            reason = "nothing" if written is None else written.finish_reason
            raise ServerError("vLLM ended a sample early", field="finish", value=reason, limit="stop|length")
        token_ids = list(written.token_ids)
        logp = None if params.logprobs is None else _logp_of(token_ids, written.logprobs)
        return Written(token_ids, logp, written.finish_reason)

    def write_on(self, prompt_ids: list[int], spec: SamplingSpec, seed: int) -> Future[Written]:
        """`write` in the engine's loop; cancelling the future aborts it."""
        return self._loop.submit(self.write(prompt_ids, spec, seed))

    def _name(self) -> str:
        return f"lyceum-{next(self._numbers)}"

    def check_health(self) -> None:
        """Raises RuntimeError if the engine is gone."""
        if self._llm.errored:
            raise RuntimeError("vLLM's engine has died")

    def close(self) -> None:
        """Ends its processes."""
        self._loop.run(self._close())
        self._watch.communicate()

    async def _close(self) -> None:
        handler = self._llm.output_handler
        if handler is not None:  # it would report the end of its processes as their death
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)
        self._llm.shutdown()


def start(role: Role, loop: Loop, arguments: dict[str, Any]) -> Engine:
    """An engine that has loaded its weights.

    Args:
        role: `score` gives states, `generate` writes.
        loop: where it will live.
        arguments: of vLLM's EngineArgs, as far as both roles share them.

    Raises:
        ServerConfigError: vLLM refuses the model or the memory, or its processes died.
    """
    if role == "score":
        # The head's dtype is what states travel in; float32 would double the bytes and add nothing.
        arguments = {
            **arguments,
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
            "hf_overrides": {"head_dtype": "model"},
        }
    else:
        # The grammar is that of `backends.grammar`, white space and control characters included, which come with its text.
        structured = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
        arguments = {**arguments, "structured_outputs_config": structured}
    load = Load()
    try:
        return Engine(loop.run(_start(arguments, load)), loop, load)
    except (ValueError, RuntimeError, OSError, NotImplementedError, torch.OutOfMemoryError) as error:
        said = " ".join(str(error).split())[:400]
        raise ServerConfigError(f"vLLM does not start for {role}: {said}") from error


async def _start(arguments: dict[str, Any], load: Load) -> AsyncLLM:
    def log_into(config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _LoadLogger(load)

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[log_into])


class _LoadLogger(StatLoggerBase):
    """Keeps what vLLM's scheduler says of itself."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self._load.running = scheduler_stats.num_running_reqs
            self._load.waiting = scheduler_stats.num_waiting_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def sampling_params(spec: SamplingSpec, seed: int) -> SamplingParams:
    """vLLM's way of saying `spec` for one sample.

    With a schema no log-probabilities are asked for: vLLM's are of what the schema leaves.
    """
    structured = StructuredOutputsParams(grammar=grammar.strict_text(spec.json_schema)) if spec.json_schema else None
    return SamplingParams(
        temperature=spec.temperature,
        top_p=spec.top_p,
        max_tokens=spec.max_new_tokens,
        seed=seed if spec.temperature else None,  # a stream of its own costs a kernel a step
        stop_token_ids=list(spec.stop_ids),
        ignore_eos=spec.ignore_eos,
        logprobs=None if structured else 0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=structured,
    )


def _logp_of(token_ids: list[int], logprobs: Any) -> list[float]:
    """The log-probability of each written token, at temperature 1 (vLLM's `raw_logprobs`)."""
    return [position[token].logprob for token, position in zip(token_ids, logprobs, strict=True)]


def as_wire_error(error: Exception) -> TeacherWireError:
    """What vLLM raised, as ours."""
    if isinstance(error, TeacherWireError):
        return error
    if isinstance(error, EngineDeadError):
        return UnavailableError("vLLM's engine has died and is being replaced")
    cause = error.__cause__ or error
    said = " ".join(str(cause).split())[:300]
    if isinstance(cause, ValueError):  # vLLM's VLLMValidationError is one
        return RequestError(f"vLLM refuses the request: {said}")
    return ServerError(f"vLLM: {type(cause).__name__}: {said}")
