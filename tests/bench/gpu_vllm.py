"""vLLM bare beside our vLLM backend on one GPU, in one run: labels by hidden state and top-64, and writing.

Random weights in the shape of Qwen2.5-7B (`--layers`, `--width-of tiny` for a machine without a GPU). Every figure is made in
a process of its own, one after another: bare `token_embed`, bare `prompt_logprobs`, bare writing, and ours through the backend
(labels) and the engine (writing). In: nothing; out: a table of tokens/s and the three ratios that issue 5 asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.bench.table import show
from tests.tiny import make_tokenizer

SHAPES = {
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=2048),
}  # fmt: skip
MODES = ("bare_states", "bare_logprobs", "bare_writing", "our_labels", "our_writing")
REPEAT = 3
LOGPROB_SEQUENCES = 8
K = 64


def make_folder(shape: dict[str, int], folder: Path) -> None:
    """Configuration, tokenizer and output head; vLLM makes the other weights up (`load_format=dummy`)."""
    import torch
    from safetensors.torch import save_file

    settings = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", tie_word_embeddings=False, max_position_embeddings=32768,
        dtype="bfloat16", rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu", bos_token_id=None, eos_token_id=2, **shape,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    make_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape["vocab_size"], shape["hidden_size"], generator=generator, dtype=torch.float32).mul_(0.02)
    save_file({"lm_head.weight": weight.bfloat16()}, folder / "model.safetensors")


class Bench:
    """One mode, in its own process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.vocab = SHAPES[options.shape]["vocab_size"]
        self.found: dict[str, float] = {}
        random.seed(0)

    def ids(self, sequences: int, tokens: int) -> list[list[int]]:
        return [[random.randrange(3, self.vocab) for _ in range(tokens)] for _ in range(sequences)]

    def rate(self, name: str, tokens: int, work: Callable[[], object]) -> None:
        """Tokens/s of the median of a few runs, after one to warm up."""
        work()
        times = []
        for _ in range(REPEAT):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        self.found[name] = tokens / sorted(times)[REPEAT // 2]
        print(f"  {name}: {self.found[name]:,.0f} tokens/s ({', '.join(f'{t:.2f}' for t in times)} s)", flush=True)

    def shared(self) -> dict[str, Any]:
        """What bare vLLM and ours are started with alike."""
        o = self.options
        return {
            "dtype": "bfloat16", "max_model_len": 4096 if o.shape == "7b" else 512, "enforce_eager": o.eager,
            "gpu_memory_utilization": 0.6,
        }  # fmt: skip

    def llm(self, **changes: Any) -> Any:
        from vllm import LLM

        from teacher_server.backends import death_watch

        o = self.options
        cache = {} if o.shape == "7b" else {"kv_cache_memory_bytes": 1 << 28}
        llm = LLM(
            model=str(o.folder), load_format="dummy", enable_prefix_caching=False, max_num_batched_tokens=o.batch_tokens,
            max_num_seqs=256, **self.shared(), **cache, **changes,
        )  # fmt: skip
        # This process leaves by os._exit, which vLLM's own do not notice: they would keep the GPU's memory.
        death_watch.start([child.pid for child in psutil.Process().children()])
        return llm

    def bare_states(self) -> None:
        from vllm import PoolingParams
        from vllm.config import PoolerConfig

        o = self.options
        pooling = {"runner": "pooling", "convert": "embed", "pooler_config": PoolerConfig(task="token_embed")}
        prompts = [{"prompt_token_ids": ids} for ids in self.ids(o.sequences, o.tokens)]
        llm = self.llm(**pooling)
        params = PoolingParams(use_activation=False)
        self.rate(
            "bare token_embed", o.sequences * o.tokens,
            lambda: llm.encode(prompts, pooling_params=params, pooling_task="token_embed", use_tqdm=False),
        )  # fmt: skip

    def bare_logprobs(self) -> None:
        from vllm import SamplingParams

        o = self.options
        prompts = [{"prompt_token_ids": ids} for ids in self.ids(LOGPROB_SEQUENCES, o.tokens)]
        llm = self.llm(max_logprobs=K, logprobs_mode="raw_logprobs")
        params = SamplingParams(max_tokens=1, prompt_logprobs=K, detokenize=False)
        self.rate(
            f"bare prompt_logprobs k={K}", LOGPROB_SEQUENCES * o.tokens,
            lambda: llm.generate(prompts, params, use_tqdm=False),
        )  # fmt: skip

    def bare_writing(self) -> None:
        from vllm import SamplingParams

        o = self.options
        prompts = [{"prompt_token_ids": ids} for ids in self.ids(o.samples, o.new_tokens)]
        llm = self.llm()
        plain = {"max_tokens": o.new_tokens, "ignore_eos": True, "detokenize": False}
        alike = [SamplingParams(**plain, temperature=1.0, seed=i, logprobs=0) for i in range(o.samples)]
        for name, params in (
            ("bare writing", SamplingParams(**plain, temperature=1.0)),
            ("bare writing, seeds and log-probabilities as ours", alike),
        ):
            self.rate(name, o.samples * o.new_tokens, lambda p=params: llm.generate(prompts, p, use_tqdm=False))

    def backend(self, role: str) -> tuple[Any, Any]:
        from teacher_server.backends import vllm_backend
        from teacher_server.config import TeacherConfig

        o = self.options
        config = TeacherConfig.model_validate(
            {
                "name": "bench",
                "batch": {"max_tokens": 4 * o.batch_tokens},
                "generation": {"max_running": 256, "max_cache_tokens": 1 << 20},
                "backend": {
                    "kind": "vllm", "model": str(o.folder), "roles": [role], "prefix_caching": False,
                    "max_batch_tokens": o.batch_tokens, "kv_cache_gb": None if o.shape == "7b" else 0.25, **self.shared(),
                },
            }
        )  # fmt: skip
        overrides = {"load_format": "dummy"}
        return config, vllm_backend.load(config.backend, deterministic=False, overrides=overrides)

    def our_labels(self) -> None:
        from teacher_wire.messages import SignalSpec, TokenBatch

        o = self.options
        _, model = self.backend("score")
        sequences = self.ids(o.sequences, o.tokens)
        share = max(1, len(sequences) // 4)
        batches = [TokenBatch.pack(sequences[i : i + share]) for i in range(0, len(sequences), share)]
        for name, spec in (
            ("hidden", SignalSpec("hidden", self.vocab)),
            ("top-64", SignalSpec("top_k", self.vocab, k=K)),
        ):
            jobs = [(batch, spec) for batch in batches]
            self.rate(f"ours, {name}", o.sequences * o.tokens, lambda j=jobs: model.score(j))
            self.rate(
                f"ours, {name}, a call a forward pass",
                o.sequences * o.tokens,
                lambda j=jobs: [model.score([x]) for x in j],
            )
        model.close()

    def our_writing(self) -> None:
        from teacher_server.engine import TeacherEngine
        from teacher_wire.generation import GenerateCall, PromptBatch, SamplingSpec

        o = self.options
        config, model = self.backend("generate")
        prompts = PromptBatch.pack(self.ids(o.samples, o.new_tokens))
        loop = asyncio.new_event_loop()
        engine = TeacherEngine(config, model)

        async def begin() -> None:
            engine.start()

        async def write() -> int:
            spec = SamplingSpec(max_new_tokens=o.new_tokens, ignore_eos=True)
            call = GenerateCall("bench", "", spec, prompts)
            return len([sample async for sample in engine.generate(call)])

        loop.run_until_complete(begin())
        self.rate("ours, writing", o.samples * o.new_tokens, lambda: loop.run_until_complete(write()))
        loop.run_until_complete(engine.stop())
        model.close()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--eager", action="store_true", help="no compilation and no CUDA graphs, for bare and ours alike"
    )
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lyceum-vllm-bench")
    return parser.parse_args()


def _wait_for_memory() -> None:
    """Until nobody of the last mode is left: `death_watch` ends them within a moment."""
    mine = psutil.Process().username()
    gone = time.perf_counter() + 30
    while time.perf_counter() < gone and any(
        "spawn_main" in " ".join(p.info["cmdline"] or ()) or "VLLM::" in (p.info["name"] or "")
        for p in psutil.process_iter(["cmdline", "name", "username"])
        if p.info["username"] == mine
    ):
        time.sleep(0.2)


def main() -> None:
    """Every mode in a process of its own, then the table."""
    o = options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if o.mode:
        bench = Bench(o)
        getattr(bench, o.mode)()
        (o.folder / f"{o.mode}.json").write_text(json.dumps(bench.found))
        sys.stdout.flush()
        os._exit(0)  # vLLM 0.25 aborts at interpreter exit
    make_folder(SHAPES[o.shape], o.folder)
    found: dict[str, float] = {}
    for mode in o.only:
        print(f"== {mode}", flush=True)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.gpu_vllm", "--mode", mode, *sys.argv[1:]], check=False
        )
        if done.returncode == 0:
            found |= json.loads((o.folder / f"{mode}.json").read_text())
        _wait_for_memory()
        print(f"== {mode}: exit {done.returncode} after {time.perf_counter() - began:.0f} s", flush=True)
    states, logprobs, writing = (
        found.get(n) for n in ("bare token_embed", f"bare prompt_logprobs k={K}", "bare writing")
    )
    alike = found.get("bare writing, seeds and log-probabilities as ours")
    rows: list[dict[str, object]] = []
    for name, rate in found.items():
        of = {"of bare token_embed": states, f"of prompt_logprobs k={K}": logprobs}
        if "writing" in name:
            of = {"of bare writing": writing, "of bare writing alike": alike}
        told = ", ".join(f"{rate / base:.3f} {what}" for what, base in of.items() if base)
        rows.append({"what": name, "tokens/s": round(rate), "ratios": told})
    show(
        f"vLLM bare and ours, {o.shape}, {o.sequences} x {o.tokens} tokens, one machine, one run", rows, as_json=o.json
    )


if __name__ == "__main__":
    main()
