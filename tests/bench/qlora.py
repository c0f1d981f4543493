"""QLoRA, LoRA and training whole, the same steps: time, peak memory, and the three loss curves.

Shapes of Qwen2.5-1.5B (student) and the output head of 7B (teacher), random weights, loaded by `load_student` as a run loads them; exact
labels (`hidden`) from host memory, gradient checkpointing, bfloat16, 2 x 2,048 tokens. The teacher's state is a function of the current
token, so that there is something to learn. Each arm is a process of its own: a peak is not another's leftover.
    python -m tests.bench.qlora --device cuda [--json]
    python -m tests.bench.qlora --device cpu [--json]     (a rehearsal: tiny shapes, the same code)

Columns: weights in memory; peak in use, and held by torch's allocator (the CUDA context, about 0.5 GiB, comes on top; on a CPU the peak of
the whole process); median wall time of a step behind the first three; loss of the first step, and the mean of the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("qlora", "lora", "full")
REAL = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "vocab_size": 151_936, "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY = REAL | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 128
}  # fmt: skip
LIMIT_GIB, GIB = 24.0, 1 << 30
RATES = {"qlora": 2e-4, "lora": 2e-4, "full": 2e-5}


def make_base(folder: Path, shape: dict[str, Any], dtype: str) -> None:
    """A random student on disk, and a tokenizer that `load_student` takes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.tiny import make_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.save_pretrained(folder)
    make_tokenizer(folder)


def run_arm(arm: str, folder: Path, device: str, steps: int) -> dict[str, Any]:
    """One arm from loading to its last step."""
    import torch

    from student_trainer.config.model import ModelConfig
    from student_trainer.labels.device_transfer import LabelTensors
    from student_trainer.labels.rows_on_device import rows_on
    from student_trainer.losses.divergence import Divergence
    from student_trainer.losses.head import Head
    from student_trainer.losses.output.loss import output_loss
    from student_trainer.losses.output.spec import OutputLossSpec
    from student_trainer.model.load import load_student
    from teacher_wire.core.signals import TeacherSignals
    from teacher_wire.core.tensor import Tensor as WireTensor
    from teacher_wire.core.tensor import float32

    on_gpu = device == "cuda"
    shape = REAL if on_gpu else TINY
    sequences, length, width = (2, 2048, 3584) if on_gpu else (2, 48, 48)
    dtype = "bfloat16" if on_gpu else "float32"
    tree = {
        "path": str(folder), "dtype": dtype, "gradient_checkpointing": True, "lora": None if arm == "full" else {"rank": 16},
        "quantize": "nf4" if arm == "qlora" else None, "compiled": "auto" if on_gpu else False,
    }  # fmt: skip
    student = load_student(ModelConfig.model_validate(tree), 0)
    student.model.train()
    trained = [p for p in student.model.parameters() if p.requires_grad]
    weights_gib = sum(p.nbytes for p in student.model.parameters()) / GIB
    optimizer = torch.optim.AdamW(trained, lr=RATES[arm] * (1 if on_gpu else 10), weight_decay=0.0, fused=on_gpu)
    vocab = shape["vocab_size"]
    narrow = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(1)
    head = Head((torch.randn(vocab, width) * 0.05).to(narrow).to(device))
    seen_ids = min(4096, vocab)
    state_of_id = torch.randn(seen_ids, width).to(narrow)
    spec = OutputLossSpec(Divergence("forward_kl", beta=0.5), chunk_bytes=(256 if on_gpu else 1) << 20)
    place = torch.device(device)
    losses, times = [], []
    for step in range(steps):
        ids_BL = torch.from_numpy(np.random.default_rng(step).integers(0, seen_ids, (sequences, length)))
        index_N = torch.arange(sequences * length).view(sequences, length)[:, :-1].reshape(-1)
        label_N = ids_BL[:, 1:].reshape(-1)
        hidden_ND = state_of_id[ids_BL[:, :-1].reshape(-1)]
        with torch.no_grad():  # what the teacher says of its own logits, made outside of the clock
            lse, logp = [], []
            for h_CD, label_C in zip(hidden_ND.split(256), label_N.split(256), strict=True):
                z_CV = head.logits(h_CD.to(place)).float()
                lse.append(z_CV.logsumexp(-1).cpu())
                logp.append(z_CV.gather(-1, label_C.to(place)[:, None])[:, 0].cpu() - lse[-1])
        if on_gpu:
            found = WireTensor("bfloat16", hidden_ND.view(torch.int16).numpy().view(np.uint16))
        else:
            found = float32(hidden_ND.numpy())
        signals = TeacherSignals(
            {
                "lse_N": float32(torch.cat(lse).numpy()),
                "label_logp_N": float32(torch.cat(logp).numpy()),
                "hidden_ND": found,
            },
            "f",
        )
        began = time.perf_counter()
        state_BLD = student.states(ids_BL.to(place))
        state_ND = state_BLD.reshape(-1, state_BLD.shape[-1])[index_N.to(place)]
        rows = rows_on(LabelTensors.of(signals), head, place)
        ones_N = torch.ones(label_N.numel(), device=place)
        result = output_loss(state_ND, student.head(vocab), rows, label_N.to(place), ones_N, ones_N.sum(), spec)
        result.total.backward()
        if result.integrity is not None:
            result.integrity.check()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.total.detach()))  # waits for the device
        times.append(time.perf_counter() - began)
    if on_gpu:
        peak_gib, held_gib = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    else:
        peak_gib = held_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    return {
        "arm": arm,
        "weights GiB": weights_gib,
        "peak GiB": peak_gib,
        "held GiB": held_gib,
        "step ms": statistics.median(times[3:]) * 1e3,
        "first loss": losses[0],
        "last loss": statistics.mean(losses[-max(1, steps // 10) :]),
        "computed by": student.computed_by,
        "curve": losses,
    }


def main() -> None:
    """All arms, and what the issue asks of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--steps", type=int, default=None, help="steps of each arm; 60 on a GPU, 40 on a CPU")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    steps = given.steps or (60 if given.device == "cuda" else 40)
    if steps < 5:
        parser.error("--steps must be at least 5: the first three are not timed")
    if given.arm:
        print(json.dumps(run_arm(given.arm[0], Path(given.arm[1]), given.device, steps)))
        return
    from tests.bench.real import cards as card_names
    from tests.bench.table import show

    found = []
    with tempfile.TemporaryDirectory(prefix="lyceum-qlora-") as folder:
        on_gpu = given.device == "cuda"
        make_base(Path(folder), REAL if on_gpu else TINY, "bfloat16" if on_gpu else "float32")
        cards = card_names() if on_gpu else []
        together = len(ARMS) if len(cards) >= len(ARMS) else 1  # with a card for each

        def by_itself(place: int) -> subprocess.CompletedProcess[str]:
            """An arm in a process of its own."""
            command = [sys.executable, "-m", "tests.bench.qlora", "--device", given.device, "--steps", str(steps)]
            env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": cards[place]} if together > 1 else {})}
            command += ["--arm", ARMS[place], folder]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if not done.returncode:
                figures = json.loads(done.stdout.splitlines()[-1])
                print(json.dumps({name: value for name, value in figures.items() if name != "curve"}), flush=True)
            return done

        with ThreadPoolExecutor(together) as pool:
            runs = list(zip(ARMS, pool.map(by_itself, range(len(ARMS))), strict=True))
        for arm, done in runs:
            if done.returncode:
                print(f"{arm}: failed\n{done.stderr[-3000:]}", file=sys.stderr)
                continue  # the others keep their figures
            found.append(json.loads(done.stdout.splitlines()[-1]))
    curves = {arm["arm"]: arm.pop("curve") for arm in found}
    show(f"2 x 2,048 tokens, {given.device}" if on_gpu else "tiny shapes, a rehearsal", found, as_json=False)
    marks = sorted({0, *(round(k * (steps - 1) / 9) for k in range(1, 10))})
    show(
        "loss by step",
        [{"step": step + 1, **{arm: curve[step] for arm, curve in curves.items()}} for step in marks],
        as_json=False,
    )
    by_arm = {arm["arm"]: arm for arm in found}
    if len(found) < len(ARMS):
        if given.json:
            print(json.dumps({"rows": found, "curves": curves}))
        raise SystemExit(1)
    within = {arm: by_arm[arm]["held GiB"] <= LIMIT_GIB for arm in ("qlora", "lora")}
    behind = by_arm["qlora"]["last loss"] / by_arm["lora"]["last loss"] - 1
    verdict = f"within {LIMIT_GIB:g} GiB: {within}; QLoRA's last loss is {behind:+.1%} of LoRA's"
    print(verdict)
    if given.json:
        print(json.dumps({"rows": found, "curves": curves, "within_24_gib": within, "qlora_behind_lora": behind}))


if __name__ == "__main__":
    main()
