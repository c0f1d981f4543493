"""What an output loss computes, as numbers of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from student_trainer.errors import ConfigError
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.output.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class OutputLossSpec:
    """What is computed; total = (kd_weight * kd_sum + sft_weight * ce_sum) / normalizer.

    Attributes:
        divergence: of teacher and student.
        temperature: of the divergence; hard labels are always at 1.
        tau_squared: multiply the divergence, and so its gradient, by temperature squared (docs/concepts/method.md 1.4).
        kd_weight, sft_weight: of the two terms; a weight of 0 leaves the sum in the parts.
        tempered_head: the objective of `truncated.tempered_head_and_grad`, for top-k rows only.
        policy_gradient: in place of the divergence, on the student's own samples; None for the divergence.
        chunk_bytes: logits held at a time, roughly; sets the rows of a chunk.
    Raises:
        ConfigError: a number out of range, or a policy gradient at a temperature other than 1.
    """

    divergence: Divergence = field(default_factory=Divergence)
    temperature: float = 1.0
    tau_squared: bool = False
    kd_weight: float = 1.0
    sft_weight: float = 0.0
    tempered_head: bool = False
    policy_gradient: PolicyGradient | None = None
    chunk_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        positive, weights = ("temperature", "chunk_bytes"), ("kd_weight", "sft_weight")
        for name in (*positive, *weights):
            value = getattr(self, name)
            if not (value > 0 or (name in weights and value == 0)):
                raise ConfigError(f"{name} must be {'at least' if name in weights else 'above'} 0, not {value}")

        if self.policy_gradient is not None and (self.temperature != 1 or self.tempered_head):
            raise ConfigError(
                f"pg_rkl is about the probabilities that sampled the tokens: temperature must be 1, not {self.temperature:g}, and "
                "tempered_head false"
            )

    def chunk_rows(self, vocab_rows: int, bytes_each: int = 16) -> int:
        """C: [C, V] fills `chunk_bytes`; four float32 buffers unless said otherwise (docs/concepts/method.md 3.3).

        Whole tiles of a matrix product where there are some.
        """
        rows = max(16, min(1024, self.chunk_bytes // (bytes_each * vocab_rows)))
        return rows - rows % 128 if rows > 128 else rows
