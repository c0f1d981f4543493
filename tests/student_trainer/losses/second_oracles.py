"""What TRL and Liger compute on small seeded inputs, kept as numbers so that every test run compares with them.

In: the two packages, wherever they are importable; out: second_oracles.json, inputs and outputs as exact float64 text.
Must never be needed by the tests that read the numbers, nor hold a line of those packages' code.

Neither package is a dependency: Liger requires triton, of which a machine without a GPU has no use. To make the file again:
    pip install --no-deps --target DIR trl==1.16.0 liger-kernel==0.8.5
    PYTHONPATH=DIR python -m tests.student_trainer.losses.second_oracles

Axes: N rows, V ids, D width of the student, E width of the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TAUS = (0.7, 1.0, 2.0, 8.0)
IGNORED = -100


def inputs(name: str) -> dict[str, Tensor]:
    """float64 logits with a spread of 2; or states and heads, one row of six masked."""
    g = torch.Generator().manual_seed(20)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    if name == "trl":
        return {"student_NV": 2 * normal(4, 7), "teacher_NV": 2 * normal(4, 7)}
    shapes = {"student_ND": (6, 3), "student_VD": (7, 3), "teacher_NE": (6, 4), "teacher_VE": (7, 4)}
    labels = torch.tensor([3, 0, IGNORED, 6, 1, 1])
    return {key: normal(*shape) for key, shape in shapes.items()} | {"labels_N": labels}


def trl(beta: float, tau: float, student_NV: Tensor, teacher_NV: Tensor) -> dict[str, Tensor]:
    """Loss a row of `GKDTrainer.generalized_jsd_loss`, and the gradient of its sum."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student_NV = student_NV.clone().requires_grad_()
    loss_1NV = GKDTrainer.generalized_jsd_loss(
        student_NV[None], teacher_NV[None], beta=beta, temperature=tau, reduction="none"
    )
    (grad_NV,) = torch.autograd.grad(loss_1NV.sum(), student_NV)
    return {"loss_N": loss_1NV[0].sum(-1).detach(), "grad_NV": grad_NV}


def liger(
    beta: float, tau: float, student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor,
    labels_N: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Half the hard labels' loss and half the chunked JSD, a mean over valid rows; gradients on states and weight."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    states, weight = student_ND.clone().requires_grad_(), student_VD.clone().requires_grad_()
    loss_fn = LigerFusedLinearJSDLoss(beta=beta, temperature=tau, compiled=False, chunk_size=2, ignore_index=IGNORED)
    loss = loss_fn(states, weight, teacher_NE, teacher_VE, labels_N)
    grad_ND, grad_VD = torch.autograd.grad(loss, (states, weight))
    return {"loss": loss.detach().double(), "grad_ND": grad_ND, "grad_VD": grad_VD}


ORACLES: dict[str, tuple[str, Callable[..., dict[str, Tensor]]]] = {
    "trl": ("trl", trl),
    "liger": ("liger-kernel", liger),
}


def compute(name: str) -> dict[str, Any]:
    """Inputs and outputs of one package as plain numbers.

    Raises:
        ImportError: the package is not there.
    """
    package, function = ORACLES[name]
    given = inputs(name)
    cases = [(beta, tau) for beta in BETAS for tau in TAUS]
    return {
        "versions": {package: version(package), "torch": torch.__version__},
        "inputs": {key: value.tolist() for key, value in given.items()},
        "cases": [
            {"beta": b, "tau": t} | {key: value.tolist() for key, value in function(b, t, **given).items()}
            for b, t in cases
        ],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: compute(name) for name in ORACLES}) + "\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")
