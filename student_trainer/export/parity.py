"""Whether an exported student answers as the trained one: greedy tokens, logits and KL on prompts, against stated tolerances.

In: two models, one after the other in memory; out: `Parity`. The trained student writes answers greedily; the exported one reads the same
tokens. Where at every row its likeliest token is the one that was written, it would have written the same answers itself.
Axes: T tokens, N rows of answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from student_trainer.errors import RunError


@dataclass(frozen=True)
class Tolerance:
    """What an export may differ by.

    Attributes:
        mean_kl: largest mean of KL(trained || exported) over the rows, in nats.
        agreement: smallest share of rows at which both have the same likeliest token.
    """

    mean_kl: float
    agreement: float


# By what rounds: nothing but the order of sums; weights once more to 16 bits; weights to 8 and to 4 bits.
EXACT, SIXTEEN, EIGHT, FOUR = Tolerance(1e-6, 1.0), Tolerance(0.01, 0.95), Tolerance(0.02, 0.95), Tolerance(0.25, 0.75)


@dataclass(frozen=True)
class Answered:
    """What the trained student wrote.

    Attributes:
        prompts: token ids.
        answers: token ids, one answer per prompt.
        logits: [N, V] of each answer's rows, float32 on the host.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Tensor]


@dataclass(frozen=True)
class Parity:
    """The figures.

    Attributes:
        prompts: how many were asked.
        rows: tokens of all answers.
        same_answers: of how many prompts the whole greedy answer is the same.
        agreement: share of rows with the same likeliest token.
        max_logit_difference: of all rows and ids; after each row's mean difference is taken off, which changes no probability.
        largest_logit: in magnitude, of the trained student's.
        mean_kl, max_kl: KL(trained || exported) of a row, in nats.
        tolerance: what was allowed.
    """

    prompts: int
    rows: int
    same_answers: int
    agreement: float
    max_logit_difference: float
    largest_logit: float
    mean_kl: float
    max_kl: float
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        """Whether the export answers as the trained student, as far as its format can; false where a number is none."""
        return self.mean_kl <= self.tolerance.mean_kl and self.agreement >= self.tolerance.agreement

    @property
    def told(self) -> str:
        """One line."""
        return (
            f"greedy answers the same on {self.same_answers} of {self.prompts} prompts, {self.agreement:.1%} of {self.rows} tokens (at least "
            f"{self.tolerance.agreement:.0%}); largest logit difference {self.max_logit_difference:.2g} of {self.largest_logit:.3g}; KL mean "
            f"{self.mean_kl:.2g} (at most {self.tolerance.mean_kl:g}), max {self.max_kl:.2g} nats"
        )

    def as_dict(self) -> dict[str, Any]:
        """For export.json."""
        return {**asdict(self), "holds": self.holds}


@torch.no_grad()
def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    tell: Callable[[int], None],
) -> Answered:
    """The greedy answers of a model and its logits along them, one prompt at a time.

    Raises:
        RunError: its logits are not finite.
    """
    model.eval()
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=(list(eos_ids) or [0])[0],
    )
    answers, logits = [], []
    for number, prompt in enumerate(prompts, 1):
        ids_1T = torch.tensor([list(prompt)], device=model.device)
        written_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=greedy)
        answers.append(written_1T[0, len(prompt) :].tolist())
        logits.append(rows_of(model, prompt, answers[-1]))
        if not torch.isfinite(logits[-1]).all():
            raise RunError(
                f"the trained student's logits are not finite on prompt {number} of {len(prompts)}; it cannot be exported"
            )
        tell(number)
    return Answered([list(prompt) for prompt in prompts], answers, logits)


@torch.no_grad()
def rows_of(model: Any, prompt: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
    """[N, V] float32 on the host: the logits of each token of an answer."""
    ids_1T = torch.tensor([[*prompt, *answer_ids]], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
    found: Tensor = logits_TV[len(prompt) - 1 : -1].float().cpu()
    return found


def compare(model: Any, trained: Answered, tolerance: Tolerance, tell: Callable[[int], None]) -> Parity:
    """Holds an exported model against what the trained one wrote."""
    model.eval()
    same, agreeing, rows, largest, difference = 0, 0, 0, 0.0, 0.0
    kls = []
    for number, (prompt, written, ours_NV) in enumerate(
        zip(trained.prompts, trained.answers, trained.logits, strict=True), 1
    ):
        theirs_NV = rows_of(model, prompt, written)[:, : ours_NV.shape[1]]  # vocabulary may be padded
        ours_NV = ours_NV[:, : theirs_NV.shape[1]]
        agrees_N = ours_NV.argmax(-1) == theirs_NV.argmax(-1)
        same += bool(agrees_N.all())
        agreeing += int(agrees_N.sum())
        rows += len(written)
        off_NV = ours_NV - theirs_NV
        difference = max(difference, float((off_NV - off_NV.mean(-1, keepdim=True)).abs().max()), key=_nan_last)
        largest = max(largest, float(ours_NV.abs().max()))
        logp_NV, logq_NV = (torch.log_softmax(x.double(), -1) for x in (ours_NV, theirs_NV))
        kls.append((logp_NV.exp() * (logp_NV - logq_NV)).sum(-1))
        tell(number)
    kl_N = torch.cat(kls)
    return Parity(
        len(trained.prompts),
        rows,
        same,
        agreeing / rows,
        difference,
        largest,
        float(kl_N.mean()),
        float(kl_N.max()),
        tolerance,
    )


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value
