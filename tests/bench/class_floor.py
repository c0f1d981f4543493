"""What `top_k` labels of a teacher with another tokenizer say of a student that agrees with it in every class: the least value of the loss.

A class that the teacher has kept in part is whole at the student, so the loss is not 0 there (docs/concepts/labels.md). SmolLM2-135M-Instruct
on its own template over held-out rows is the teacher, the student's classes are those of its masses, by a partition that
`tests.bench.coverage --partitions` has made. One thread, two minutes.
    python -m tests.bench.class_floor --real FOLDER --partition .pack/parts/smollm2.safetensors [--rows N] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from student_trainer.losses.cross_tokenizer.projected import KeptClasses, class_bucket_and_grad
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from tests.bench.cross_loss import kept_partition
from tests.bench.table import show

KS = (16, 32, 64, 128, 256)
SPECS = {"forward KL": Divergence("forward_kl"), "JSD 0.5": Divergence("jsd"), "reverse KL": Divergence("reverse_kl")}


def logits_of(folder: Path, rows: int) -> torch.Tensor:
    """[N, V] of the tokens of some held-out answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=torch.float32).eval()
    found = []
    for line in (folder / "heldout.jsonl").read_text().splitlines()[:rows]:
        row = json.loads(line)
        asked = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt).input_ids)
        ids = torch.tensor([tokenizer(prompt + row["output"]).input_ids[:400]])
        with torch.no_grad():
            found.append(model(ids).logits[0, start - 1 : -1])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--partition", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    classes = kept_partition(options.partition, "cpu")
    z_NV = logits_of(options.real, options.rows)[:, : len(classes.teacher_Vt)]
    sums = {k: {"tail": 0.0} | dict.fromkeys(SPECS, 0.0) for k in KS}
    several = classes.of_teacher.size_K > 1
    in_several, full = 0.0, dict.fromkeys(SPECS, 0.0)
    for start in range(0, len(z_NV), 64):
        log_p_CV = z_NV[start : start + 64].double().log_softmax(-1)
        log_p_CK = log_p_CV.new_full((len(log_p_CV), classes.classes), 0.0)
        log_p_CK = log_p_CK.index_add_(1, classes.teacher_Vt, log_p_CV.exp()).log()
        in_several += float(log_p_CK.exp()[:, torch.from_numpy(several)].sum())
        for name, spec in SPECS.items():
            full[name] += float(divergence_and_grad(log_p_CK, log_p_CK, spec)[0].sum())
        for k in KS:
            topk_Ck, ids_Ck = log_p_CV.topk(k, dim=-1)
            tail_C = (-torch.expm1(topk_Ck.logsumexp(-1))).clamp(min=1e-300).log()
            sums[k]["tail"] += float(tail_C.exp().sum())
            for name, spec in SPECS.items():
                kept = KeptClasses.of(classes.teacher_Vt[ids_Ck], topk_Ck)
                sums[k][name] += float(class_bucket_and_grad(kept, tail_C, log_p_CK.clone(), spec)[0].sum())
    count = len(z_NV)
    whole = {"labels": "full", "tail": 0.0, **{name: value / count for name, value in full.items()}}
    rows = [{"labels": f"top_k {k}", **{name: value / count for name, value in sums[k].items()}} for k in KS]
    title = f"SmolLM2's {count:,} rows, {classes.classes:,} classes, {in_several / count:.2%} of the mass in classes of several of its ids: nats a row at a student that agrees"
    show(title, [whole, *rows], as_json=options.json)


if __name__ == "__main__":
    main()
