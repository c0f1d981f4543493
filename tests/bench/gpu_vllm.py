"""vLLM bare beside our vLLM backend on one GPU, in one run: labels by hidden state and top-64, and writing.

Random weights in the shape of Qwen2.5-7B (`--shape tiny` for a machine without a GPU). Every mode is a process of its own, one
after another: bare `token_embed`; bare writing, prefill and `prompt_logprobs`; ours through the product's engine (queue, batches begun
while the last is reduced, no gRPC). In: nothing; out: a table of tokens/s and the ratios that issue 5 asks for, as JSON under
$OUT where that is set. Made for about five minutes on an H100 or H200.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
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
MODES = ("bare_states", "our_labels", "bare_generate", "our_writing")
FURTHER = ("bare_states_16_bit", "our_labels_async", "bare_states_compiled", "our_labels_compiled")  # by --only
WRITING = ("bare_generate", "our_writing")  # in this order
K = 64
REQUEST_TOKENS = 4096
LOGPROB_SEQUENCES = 8
# How bare and ours decode alike. `graphs` captures whole decoding steps without torch.compile, which takes a minute to start.
DECODING: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256],
        },
    },
    "compiled": {"enforce_eager": False},
}


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
    weight = torch.randn(shape["vocab_size"], shape["hidden_size"], generator=generator, dtype=torch.bfloat16).mul_(
        0.02
    )
    save_file({"lm_head.weight": weight}, folder / "model.safetensors")


class Bench:
    """One mode, in its own process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.vocab = SHAPES[options.shape]["vocab_size"]
        self.found: dict[str, float] = {}
        self._began_s = time.perf_counter()
        random.seed(0)

    def ids(self, sequences: int, tokens: int) -> list[list[int]]:
        return [[random.randrange(3, self.vocab) for _ in range(tokens)] for _ in range(sequences)]

    def rate(self, name: str, tokens: int, work: Callable[[int], object], parts: int, repeat: int = 3) -> None:
        """Tokens/s of the median of a few runs of `work(parts)`, after one of a quarter of it to warm up."""
        if self._began_s:
            print(f"  ready after {time.perf_counter() - self._began_s:.0f} s", flush=True)
            self._began_s = 0.0
        work(max(1, parts // 4))
        times = []
        for _ in range(repeat):
            began_s = time.perf_counter()
            work(parts)
            times.append(time.perf_counter() - began_s)
        self.found[name] = tokens / statistics.median(times)
        print(f"  {name}: {self.found[name]:,.0f} tokens/s ({', '.join(f'{t:.2f}' for t in times)} s)", flush=True)

    def shared(self, decoding: str) -> dict[str, Any]:
        """What bare vLLM and ours are started with alike."""
        length = 4096 if self.options.shape == "7b" else 512
        return {"dtype": "bfloat16", "max_model_len": length, "gpu_memory_utilization": 0.6, **DECODING[decoding]}

    def llm(self, decoding: str, **changes: Any) -> Any:
        from vllm import LLM

        from teacher_server.backends import death_watch

        o = self.options
        cache = {} if o.shape == "7b" else {"kv_cache_memory_bytes": 1 << 28}
        llm = LLM(
            model=str(o.folder), load_format="dummy", enable_prefix_caching=False, max_num_batched_tokens=o.batch_tokens,
            max_num_seqs=256, **self.shared(decoding), **cache, **changes,
        )  # fmt: skip
        # This process leaves by os._exit, which vLLM's own do not notice: they would keep the GPU's memory.
        death_watch.start([child.pid for child in psutil.Process().children()])
        return llm

    def bare_states(self, name: str = "bare token_embed (float32)", decoding: str = "eager", **changes: Any) -> None:
        from vllm import PoolingParams
        from vllm.config import PoolerConfig

        o = self.options
        prompts = [{"prompt_token_ids": ids} for ids in self.ids(o.sequences, o.tokens)]
        llm = self.llm(
            decoding, runner="pooling", convert="embed", pooler_config=PoolerConfig(task="token_embed"), **changes
        )
        params = PoolingParams(use_activation=False)

        def encode(parts: int) -> None:
            llm.encode(prompts[:parts], pooling_params=params, pooling_task="token_embed", use_tqdm=False)

        self.rate(name, o.sequences * o.tokens, encode, o.sequences)

    def bare_states_16_bit(self) -> None:
        self.bare_states("bare token_embed (bfloat16, as ours)", hf_overrides={"head_dtype": "model"})

    def bare_states_compiled(self) -> None:
        self.bare_states("bare token_embed (float32), compiled", "compiled")

    def bare_generate(self) -> None:
        from vllm import SamplingParams

        o = self.options
        prompts = [{"prompt_token_ids": ids} for ids in self.ids(o.samples, o.prompt_tokens)]
        scored = [{"prompt_token_ids": ids} for ids in self.ids(LOGPROB_SEQUENCES, o.tokens)]
        llm = self.llm(o.decoding, max_logprobs=K, logprobs_mode="raw_logprobs")
        plain = {"max_tokens": o.new_tokens, "ignore_eos": True, "detokenize": False}
        alike = [SamplingParams(**plain, temperature=1.0, seed=i, logprobs=0) for i in range(o.samples)]
        for name, params in (
            ("bare writing", [SamplingParams(**plain, temperature=1.0)] * o.samples),
            ("bare writing, seeds and log-probabilities as ours", alike),
        ):

            def write(parts: int, params: list[SamplingParams] = params) -> None:
                llm.generate(prompts[:parts], params[:parts], use_tqdm=False)

            self.rate(name, o.samples * o.new_tokens, write, o.samples)
        for name, asked, repeat in (
            ("bare prefill, no labels", {}, 3),
            (f"bare prompt_logprobs k={K}", {"prompt_logprobs": K}, 2),
        ):
            params = SamplingParams(max_tokens=1, detokenize=False, **asked)

            def score(parts: int, params: SamplingParams = params) -> None:
                llm.generate(scored[:parts], params, use_tqdm=False)

            self.rate(name, LOGPROB_SEQUENCES * o.tokens, score, LOGPROB_SEQUENCES, repeat=repeat)

    def engine(self, role: str, decoding: str, **overrides: Any) -> tuple[Any, Any]:
        """The product's engine around our backend, and the backend."""
        from teacher_server.backends.vllm import backend
        from teacher_server.config.server import TeacherConfig
        from teacher_server.replica.engine import TeacherEngine

        o = self.options
        shared = self.shared(decoding)
        overrides |= {"load_format": "dummy"} | {k: shared.pop(k) for k in ("compilation_config",) if k in shared}
        config = TeacherConfig.model_validate(
            {
                "name": "bench",
                "batch": {"max_tokens": max(o.batch_tokens, REQUEST_TOKENS)},
                "generation": {"max_running": 256, "max_cache_tokens": 1 << 20},
                "backend": {
                    "kind": "vllm", "model": str(o.folder), "roles": [role], "prefix_caching": False,
                    "max_batch_tokens": o.batch_tokens, "kv_cache_gb": None if o.shape == "7b" else 0.25, **shared,
                },
            }
        )  # fmt: skip
        model = backend.load(config.backend, deterministic=False, overrides=overrides)
        return TeacherEngine(config, model), model

    def our_labels(self, note: str = "", decoding: str = "eager", **overrides: Any) -> None:
        from teacher_wire.core.batch import TokenBatch
        from teacher_wire.core.calls import ScoreCall
        from teacher_wire.core.signals import SignalSpec
        from teacher_wire.score.signals import spec_of

        o = self.options
        engine, model = self.engine("score", decoding, **overrides)
        each = max(1, REQUEST_TOKENS // o.tokens)
        sequences = self.ids(o.sequences, o.tokens)
        requests = [TokenBatch.pack(sequences[i : i + each]) for i in range(0, len(sequences), each)]
        loop = asyncio.new_event_loop()

        async def start() -> None:
            engine.start()

        async def ask(spec: SignalSpec, batch: TokenBatch) -> tuple[int, int]:
            answer = await engine.score(ScoreCall("bench", "", "", spec, batch))  # and lets it go
            return answer.rows, answer.timing.reduce_us

        async def score(spec: SignalSpec, parts: int) -> None:
            answers = await asyncio.gather(*(ask(spec, batch) for batch in requests[:parts]))
            assert sum(rows for rows, _ in answers) == sum(batch.rows for batch in requests[:parts])
            print(f"    of a batch, reduce: {statistics.median(us for _, us in answers) / 1e3:.1f} ms", flush=True)

        loop.run_until_complete(start())
        for name, spec in (
            ("hidden", spec_of("hidden", self.vocab, check="sampled")),
            (f"top-{K}", spec_of("top_k", self.vocab, k=K)),
        ):
            self.rate(
                f"ours, {name}{note}", o.sequences * o.tokens,
                lambda parts, s=spec: loop.run_until_complete(score(s, parts)), len(requests),
            )  # fmt: skip
        loop.run_until_complete(engine.stop())
        model.close()

    def our_labels_async(self) -> None:
        self.our_labels(" (vLLM's async scheduling)", async_scheduling=True)

    def our_labels_compiled(self) -> None:
        self.our_labels(" (compiled, async scheduling)", "compiled", async_scheduling=True)

    def our_writing(self) -> None:
        from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec

        o = self.options
        prompts = self.ids(o.samples, o.prompt_tokens)
        engine, model = self.engine("generate", o.decoding)
        loop = asyncio.new_event_loop()

        async def start() -> None:
            engine.start()

        async def write(parts: int) -> None:
            spec = SamplingSpec(max_new_tokens=o.new_tokens, ignore_eos=True)
            call = GenerateCall("bench", "", spec, PromptBatch.pack(prompts[:parts]))
            samples = [sample async for sample in engine.generate(call)]
            assert sum(len(sample.token_ids_n) for sample in samples) == parts * o.new_tokens

        loop.run_until_complete(start())
        self.rate("ours, writing", o.samples * o.new_tokens, lambda n: loop.run_until_complete(write(n)), o.samples)
        loop.run_until_complete(engine.stop())
        model.close()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--sequences", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument(
        "--decoding", choices=sorted(DECODING), default="graphs", help="of writing, for bare and ours alike"
    )
    parser.add_argument("--only", nargs="+", choices=MODES + FURTHER, default=MODES)
    parser.add_argument("--mode", choices=MODES + FURTHER, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=170, help="seconds after which a mode is given up")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lyceum-vllm-bench")
    return parser.parse_args()


def _wait_for_memory() -> None:
    """Until nobody of the last mode is left: `death_watch` ends them within a moment."""
    mine = psutil.Process().username()
    gone_s = time.perf_counter() + 30
    while time.perf_counter() < gone_s and any(
        "spawn_main" in " ".join(p.info["cmdline"] or ()) or "VLLM::" in (p.info["name"] or "")
        for p in psutil.process_iter(["cmdline", "name", "username"])
        if p.info["username"] == mine
    ):
        time.sleep(0.2)


def run(mode: str, o: argparse.Namespace, decoding: str) -> dict[str, float]:
    """The figures of one mode; none if it failed."""
    print(f"== {mode}, {decoding if mode in WRITING else 'eager'}", flush=True)
    began_s = time.perf_counter()
    figures = o.folder / f"{mode}.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.gpu_vllm", *sys.argv[1:], "--mode", mode, "--decoding", decoding]
    child = subprocess.Popen(command)
    try:
        code = child.wait(timeout=o.limit)
    except subprocess.TimeoutExpired:
        for process in (*psutil.Process(child.pid).children(recursive=True), child):
            process.kill()
        code = child.wait()
    _wait_for_memory()
    print(f"== {mode}: exit {code} after {time.perf_counter() - began_s:.0f} s", flush=True)
    return json.loads(figures.read_text()) if code == 0 else {}


def rows_of(found: dict[str, float]) -> list[dict[str, object]]:
    """The table, with what issue 5 asks each figure to be measured against."""
    bases = {
        "of bare token_embed": found.get("bare token_embed (float32)"),
        "of bare, compiled": found.get("bare token_embed (float32), compiled"),
        "of prompt_logprobs": found.get(f"bare prompt_logprobs k={K}"),
        "of bare writing": found.get("bare writing"),
        "of bare writing as ours": found.get("bare writing, seeds and log-probabilities as ours"),
    }
    rows: list[dict[str, object]] = []
    for name, rate in found.items():
        told = ", ".join(
            f"{rate / base:.3f} {what}" for what, base in bases.items() if base and ("writing" in name) == ("writing" in what)
        )  # fmt: skip
        rows.append({"what": name, "tokens/s": round(rate), "ratios": told})
    return rows


def main() -> None:
    """Every mode in a process of its own, then the table."""
    o = options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if o.mode:
        bench = Bench(o)
        getattr(bench, o.mode)()
        (o.folder / f"{o.mode}.json").write_text(json.dumps(bench.found))
        sys.stdout.flush()
        os._exit(0)  # vLLM 0.25 aborts at interpreter exit
    make_folder(SHAPES[o.shape], o.folder)
    found: dict[str, float] = {}
    decoding = o.decoding
    for mode in o.only:
        figures = run(mode, o, decoding)
        if not figures and mode in WRITING and decoding != "eager":
            print(f"== {decoding} failed: bare and ours write eagerly", flush=True)
            decoding = "eager"
            for again in WRITING[: WRITING.index(mode) + 1]:
                figures |= run(again, o, decoding) if again in o.only else {}
        found |= figures
        _keep({"decoding": decoding, "shape": o.shape, "options": {k: str(v) for k, v in vars(o).items()}, **found})
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = (
        f"vLLM bare and ours, {o.shape} shape, {where}: labels of {o.sequences} x {o.tokens} tokens (eager; bare sends float32, "
        f"ours bfloat16), {o.samples} texts of {o.new_tokens} tokens ({decoding})"
    )
    show(title, rows_of(found), as_json=o.json)


def _keep(figures: dict[str, object]) -> None:
    """Under $OUT after every mode, so that a run that is cut off leaves what it has."""
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "gpu_vllm.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
