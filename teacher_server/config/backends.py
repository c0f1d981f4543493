"""Settings of the kinds of model that can stand behind a teacher; `BACKENDS` is the registry.

In: the section `backend` of a teacher; out: the settings of its kind, which name the module that loads it. Nothing here loads anything.
A new kind is a file of its own, with its settings and `load`, and one line in `BACKENDS`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from teacher_server.config.files import Settings


class BackendConfig(Settings):
    """Settings of one kind of backend.

    Attributes:
        built_by: the module whose `load(config, deterministic=...)` gives the `backends.Backend`; imported only when one is built.
        kind: its key in `BACKENDS`.
    """

    built_by: ClassVar[str]

    kind: str


class TransformersBackend(BackendConfig):
    """A causal language model that transformers loads, with every signal.

    Attributes:
        kind: `transformers`.
        model: hub id or local folder.
        revision: revision (branch, tag or commit) of a hub id.
        dtype: dtype of weights and arithmetic.
        device: torch device; `auto` is cuda where there is one.
        threads: torch threads of a replica on a CPU.
        attention: transformers' attn_implementation; `auto` is sdpa, and eager where the model soft-caps its attention scores (Gemma 2),
            which sdpa would leave out.
        serve_head: whether students may fetch the output head, which `hidden` labels need.
        reduce_mb: MiB of logits held at a time while labels are reduced; if null 1280 on CUDA, 64 elsewhere.
        packing: `auto` runs sequences one behind the other without padding where a probe finds the same states; `off` pads.
        layers: `fused` are our own layers for Llama-shaped models, `transformers` are the library's; `auto` is fused on CUDA.
        prefix_min_tokens: length from which a prefix that sequences of a batch share is computed once (packed, and not deterministic); 0
            never shares.
        quantization: `fp8` multiplies the layers' matrices as float8 rows, on Hopper or newer, with fused layers; the error of the labels
            is measured at loading.
    """

    built_by: ClassVar = "teacher_server.backends.transformers.backend"

    kind: Literal["transformers"] = "transformers"
    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] = 1
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    serve_head: bool = True
    reduce_mb: Annotated[int, Field(ge=1)] | None = None
    packing: Literal["auto", "off"] = "auto"
    layers: Literal["auto", "transformers", "fused"] = "auto"
    prefix_min_tokens: Annotated[int, Field(ge=0)] = 64
    quantization: Literal["none", "fp8"] = "none"


class VllmBackend(BackendConfig):
    """A causal language model that vLLM runs: labels from its final states, and writing in running batches.

    Every role is an engine of its own, with its own copy of the weights: one replica with both needs twice the weights,
    two deployments of one role each need the same in two places. JSON schemas need both roles in one replica, since the
    log-probabilities of a sample before its schema come from the engine that scores. A replica also holds the output head
    (vocabulary x width x bytes of the dtype, 1.1 GB for Qwen2.5-7B) and `reduce_mb`.

    Attributes:
        kind: `vllm`.
        model: hub id or local folder.
        revision: revision (branch, tag or commit) of a hub id.
        dtype: dtype of weights and arithmetic.
        roles: `score`, `generate` or both.
        max_model_len: longest sequence; the model's own limit if null. The KV cache must hold one.
        gpu_memory_utilization: share of a GPU that all engines of the replica take together, in equal parts: weights, activations and, with
            what is left, KV cache. Not used where `kv_cache_gb` is given.
        kv_cache_gb: GiB of KV cache of each engine; on a CPU 1 if null.
        tensor_parallel_size: GPUs (processes on a CPU) over which each engine is spread; `num_gpus` must give as many.
        prefix_caching: whether `generate` reuses cached prompts. Labels need every token's state, so `score` never reads the cache.
        max_batch_tokens: tokens of one forward pass of an engine. `batch.max_tokens` should be no less: two such batches are under way at a
            time, so that the engine computes the next labels while the last are reduced and sent.
        max_sequences: sequences that an engine runs at once.
        enforce_eager: no compilation and no CUDA graphs: starts in seconds, generates more slowly.
        threads: threads of each engine on a CPU, and of the reductions.
        serve_head: whether students may fetch the output head, which `hidden` labels need.
        reduce_mb: MiB of logits held at a time while labels are reduced; if null 640 on CUDA, 64 elsewhere.
        answer_mb: MiB of the largest answer to one request; `full` takes rows x vocabulary x bytes of the dtype.
    """

    built_by: ClassVar = "teacher_server.backends.vllm.backend"

    kind: Literal["vllm"] = "vllm"
    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    roles: Annotated[tuple[Literal["score", "generate"], ...], Field(min_length=1)] = ("score",)
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    kv_cache_gb: Annotated[float, Field(gt=0)] | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    prefix_caching: bool = True
    max_batch_tokens: Annotated[int, Field(ge=16)] = 16_384
    max_sequences: Annotated[int, Field(ge=1)] = 256
    enforce_eager: bool = False
    threads: Annotated[int, Field(ge=1)] = 1
    serve_head: bool = True
    reduce_mb: Annotated[int, Field(ge=1)] | None = None
    answer_mb: Annotated[int, Field(ge=1)] = 1_024

    @model_validator(mode="after")
    def _distinct_roles(self) -> VllmBackend:
        if len(set(self.roles)) != len(self.roles):
            raise ValueError(f"roles are named once each, got {', '.join(self.roles)}")
        return self


class FakeBackend(BackendConfig):
    """The deterministic fake of `teacher_wire.testing.fake_teacher`, for trying things out without a model.

    Attributes:
        kind: `fake`.
        vocab_rows: ids of its vocabulary.
        hidden_size: width of its states.
        layers: blocks that it pretends to have.
        seed: seed of its answers.
        delay_s: seconds of every forward pass.
        tokens_per_s: speed that it pretends to have; null is as fast as it can.
        breaks_after: forward passes after which every further one raises a CUDA error, as a lost context does; 0 for never.
    """

    built_by: ClassVar = "teacher_server.backends.fake"

    kind: Literal["fake"] = "fake"
    vocab_rows: Annotated[int, Field(ge=2)] = 64
    hidden_size: Annotated[int, Field(ge=1)] = 16
    layers: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    delay_s: Annotated[float, Field(ge=0)] = 0.0
    tokens_per_s: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    breaks_after: Annotated[int, Field(ge=0)] = 0


BACKENDS: dict[str, type[BackendConfig]] = {
    "transformers": TransformersBackend,
    "vllm": VllmBackend,
    "fake": FakeBackend,
}
