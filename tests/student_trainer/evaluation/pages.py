"""Outcomes for the tests of the page, and for looking at it: python -m tests.student_trainer.evaluation.pages FOLDER."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

from student_trainer.evaluation.outcome import Budget, Cost, Evaluated, Layers, Outcome, RunOutcome, Sample

HOSTILE = "</style><script>alert(1)</script>\u202eevil & \"quotes\" 'too' <img src=x onerror=alert(2)> \x00\ud800 {{ 7 * 7 }} | `x`"


def run(name: str, seed: int, nll: float = 1.3, kl: float | None = 0.9, steps: int = 200, **more) -> RunOutcome:
    draw = random.Random(f"{name}{seed}")
    curve: list[dict] = []
    for step in range(10, steps + 1, 10):
        falls = math.exp(-step / 60)
        curve.append(
            {
                "step": step,
                "loss": (0.6 if "gkd" in name else 1.4) + 2 * falls + draw.gauss(0, 0.03),
                "tokens_per_s": 4100.0 + draw.gauss(0, 90),
            }
        )
        if step % 50 == 0:
            curve.append({"step": step, "eval_nll_per_byte": nll + falls + draw.gauss(0, 0.006), "eval_acc1": 0.5 - 0.3 * falls,
                          "eval_kl_to_teacher": None if kl is None else kl + 1.4 * falls + draw.gauss(0, 0.01)})  # fmt: skip
    metrics = {"nll_per_byte": nll + draw.gauss(0, 0.008), "kl_to_teacher": kl and kl + draw.gauss(0, 0.01), "acc1": 0.44 + draw.gauss(0, 0.004),
               "acc3": 0.63 + draw.gauss(0, 0.004), "teacher_nll_per_byte": 1.0571, "teacher_acc1": 0.5613, "teacher_acc3": 0.7412}  # fmt: skip
    cost = Cost(train_s=61 + draw.gauss(0, 2), wall_s=80 + draw.gauss(0, 2), gpu_hours=0.0222, teacher_tokens=0 if seed else 412_310,
                disk_tokens=412_310 if seed else 0, label_bytes=188_211_003)  # fmt: skip
    fields = {"state": "done", "steps": steps, "metrics": metrics, "curve": curve, "cost": cost, **more}
    return RunOutcome(name=name, seed=seed, **fields)


def comparison(**changes) -> Outcome:
    arms = {"sft": (1.318, 0.93), "gkd": (1.402, 0.41), "gkd+sft": (1.262, 0.47), "article": (1.55, 0.71)}
    layers = Layers(
        before={f"{kind}_{b}": v for b in (4, 9, 14) for kind, v in (("cka", 0.31), ("hidden_loss", 0.9))},
        after={f"{kind}_{b}": v + b / 100 for b in (4, 9, 14) for kind, v in (("cka", 0.66), ("hidden_loss", 0.2))},
    )
    runs = [
        run(arm, seed, nll, kl, settings={} if arm == "sft" else {"loss.sft_weight": 0.5, "loss.output.divergence": "forward_kl"},
            layers=layers if arm == "article" else None)
        for seed in (0, 1, 2) for arm, (nll, kl) in arms.items()
    ]  # fmt: skip
    fields = dict(
        title="student-compare", base="sft", budget=Budget(by="steps", steps=dict.fromkeys(arms, 200)), seeds=[0, 1, 2], seconds=960.0, arms=runs,
        config={"run": {"output_dir": "runs/student", "seed": 0}, "model": {"path": "Qwen/Qwen2.5-1.5B-Instruct"}, "train": {"max_steps": 200}},
        versions={"python": "3.11.9", "torch": "2.13.0", "lyceum": "0.1.0", "device": "NVIDIA H100 80GB HBM3"},
    )  # fmt: skip
    return Outcome(**{**fields, **changes})


EVALUATED = [
    Evaluated(name="before", metrics={"acc1": 0.3812, "avg_response_len": 212.4}, tasks={"ceval-valid": {"metric": "acc", "value": 0.4411, "stderr": 0.0132}},
              speed={"decode_tokens_per_s": 81.2, "peak_memory_bytes": 3_212_212_224}),
    Evaluated(name="after", metrics={"acc1": 0.4466, "avg_response_len": 154.0}, tasks={"ceval-valid": {"metric": "acc", "value": 0.4702, "stderr": 0.0131}},
              speed={"decode_tokens_per_s": 80.9, "peak_memory_bytes": 3_212_212_224}),
    Evaluated(name="teacher", metrics={"acc1": 0.5613}, tasks={"ceval-valid": {"metric": "acc", "value": 0.6213, "stderr": 0.0127}}),
]  # fmt: skip
SAMPLES = [
    Sample(prompt="Why is the sky blue?", reference="Rayleigh scattering.", answers={
        "before": "The sky is blue because it is blue. " * 12, "after": "Air molecules scatter short wavelengths more strongly than long ones.",
        "teacher": "Sunlight is scattered by molecules that are much smaller than its wavelength; the strength goes with the inverse fourth power of it."}),
    Sample(prompt="اكتب جملة عن البحر", answers={"before": "البحر واسع وجميل.", "after": "", "teacher": "天空是蓝色的，海也是。"}),
    Sample(prompt=HOSTILE, answers={"before": HOSTILE * 3, "after": "x" * 1_000_000, "<b>name</b>": "ok"}),
]  # fmt: skip


def pages() -> dict[str, str]:
    """Name -> page, of every state that a report can be in."""
    from student_trainer.evaluation.page.content import report_of
    from student_trainer.evaluation.page.html import as_html

    failed = [run("sft", 0), run("sft", 1), run("gkd", 0, kl=None, metrics={"nll_per_byte": None, "kl_to_teacher": None, "acc1": 0.1, "acc3": 0.2}),
              run("gkd", 1, state="failed", error="loss of step 20 is not finite: lower train.learning_rate", metrics={}, curve=[{"step": 10, "loss": None}])]  # fmt: skip
    long = "an-arm-with-a-rather-long-name-for-a-table-of-several-columns"
    outcomes = {
        "full": ([comparison()], EVALUATED, SAMPLES),
        "one-run": ([Outcome(title="run", base="run", seeds=[0], arms=[run("run", 0)], budget=Budget(steps={"run": 200}))], [], []),
        "aborted": ([Outcome(title="run", base="run", seeds=[3], arms=[RunOutcome(name="run", seed=3, state="unfinished")])], [], []),
        "failed": ([comparison(arms=failed, seeds=[0, 1], notes=["gkd trained for 3.1 min on average, not 5."])], [], []),
        "hostile": ([comparison(title=HOSTILE.replace("\ud800", ""), arms=[run("sft", 0), run(long, 0, error=HOSTILE, state="failed", metrics={})], seeds=[0]),
                     comparison()], EVALUATED, SAMPLES[2:]),
    }  # fmt: skip
    return {name: as_html(report_of(*content)) for name, content in outcomes.items()}


if __name__ == "__main__":
    for name, page in pages().items():
        (Path(sys.argv[1]) / f"{name}.html").write_text(page, encoding="utf-8")
