"""A random teacher in the shape of Qwen2.5-7B, and how fast it makes labels without a server around it.

Used by `gpu_server`; no downloads. Axes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from teacher_server.backends.transformers.backend import TransformersModel
from teacher_server.config.backends import TransformersBackend
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import SignalSpec
from teacher_wire.score.signals import spec_of
from tests.bench.gpu_client import UNIFORM, fresh_batch
from tests.tiny import make_tokenizer

VOCAB, K, BATCH_TOKENS = 152_064, 64, 16_384
SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
TOP_K, HIDDEN = spec_of("top_k", VOCAB, k=K), spec_of("hidden", VOCAB, check="sampled")
SPECS = {f"top-{K}": TOP_K, "hidden": HIDDEN}
ROUNDS = 6


def random_model() -> Any:
    """Weights as `Qwen2ForCausalLM` draws them."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def backend(model: Any, *, deterministic: bool = False, **settings: Any) -> TransformersModel:
    """Our backend around a loaded model."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(Path(folder)))
    config = TransformersBackend(model="random-7b", **settings)
    return TransformersModel(config, model, model.config, tokenizer, "f" * 64, deterministic=deterministic)


def eager(model: Any) -> dict[str, float]:
    """transformers as it is, 8 x 2048 tokens: the body alone, and with head, log-sum-exp and top-64 the plain way."""
    ids_BL = torch.randint(0, VOCAB, (BATCH_TOKENS // UNIFORM, UNIFORM), device="cuda")

    def body() -> torch.Tensor:
        found: torch.Tensor = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return found

    def labels() -> None:
        for state_CD in body().view(-1, SHAPE["hidden_size"]).split(2048):
            logits_CV = model.lm_head(state_CD).float()
            _ = torch.logsumexp(logits_CV, -1), logits_CV.topk(K, dim=-1)

    with torch.inference_mode():
        return {"body": rate(body, BATCH_TOKENS), f"top-{K}": rate(labels, BATCH_TOKENS)}


def rate(function: Callable[[], object], tokens: int, rounds: int = ROUNDS) -> float:
    """Tokens a second, median of rounds after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began_s)
    return tokens / statistics.median(times[1:])


def loop(model: TransformersModel, batches: list[TokenBatch], spec: SignalSpec, rounds: int = ROUNDS) -> float:
    """Tokens a second of our backend in a loop, the next batch begun before the last one is waited for."""
    jobs = [(batch, spec) for batch in batches]
    model.score(jobs)
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    last = model.begin(jobs)
    for _ in range(rounds - 1):
        following = model.begin(jobs)
        last()
        last = following
    last()
    return sum(batch.tokens for batch in batches) * rounds / (time.perf_counter() - began_s)


def requests(kind: str, tokens: int = BATCH_TOKENS) -> list[TokenBatch]:
    """Requests of 4,096 tokens that make one batch."""
    rng = np.random.default_rng(0)
    return [fresh_batch(rng, kind, 4096, VOCAB) for _ in range(tokens // 4096)]


def growth(model: TransformersModel, counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)) -> list[dict[str, object]]:
    """Time a token for so many sequences of 2,048 tokens in one call."""
    rng, rows = np.random.default_rng(1), []
    for count in counts:
        ids_T = rng.integers(0, VOCAB, count * UNIFORM, dtype=np.int32)
        wanted_T = np.ones(ids_T.size, np.bool_)
        cu_B1 = np.arange(0, ids_T.size + 1, UNIFORM, dtype=np.int32)
        wanted_T[cu_B1[1:] - 1] = False
        found = loop(model, [TokenBatch(ids_T, cu_B1, wanted_T)], TOP_K, max(2, 64 // count))
        rows.append({"sequences": count, "label tokens/s": round(found), "us/token": round(1e6 / found, 2)})
    return rows


def shared_prefix(model: Any, prompt: int = 1536, answer: int = 512, count: int = 8) -> dict[str, object]:
    """Label tokens per second where all sequences of a batch begin with the same prompt, computed once or each time."""
    rng = np.random.default_rng(2)
    prompt_ids = rng.integers(0, VOCAB, prompt).tolist()
    batch = TokenBatch.pack([prompt_ids + rng.integers(0, VOCAB, answer).tolist() for _ in range(count)])
    found: dict[str, object] = {"tokens": batch.tokens}
    for name, least in (("apart", 0), ("shared", 64)):
        teacher = backend(model, prefix_min_tokens=least)
        before = teacher.computed_tokens
        teacher.score([(batch, TOP_K)])
        found[f"computed {name}"] = teacher.computed_tokens - before
        found[f"label tokens/s {name}"] = round(loop(teacher, [batch], TOP_K))
    return found
