"""Peak memory of a student's step by part, as formulas over shapes.

In: a student's `Shapes` and the numbers of a step; out: an `Estimate`. Arithmetic alone: no model, no device.

The moments of a step, all of them above the same lasting parts (weights, masters, optimizer, teacher's head, labels, projectors):

    loss       activations of all blocks + a chunk of logits + states and their gradient + the head's gradient
    backward   activations of all blocks + one block made again (checkpointing) + its passing gradients + the head's gradient
    end        gradients + the embedding's own gradient, as large as the embedding, before it is added
    update     gradients (fused AdamW needs nothing beside them)

Gradients of earlier micro-batches lie there in all four, if `accumulation` is above 1 or passes are recorded. Bytes by part:

    weights      frozen parameters in `model.dtype`; 4-bit layers 0.5 a weight and 1/64 (`double`) or 4/64 of scales
    masters      4 a trained number
    optimizer    8 a trained number (AdamW's two averages), 4 a tensor
    gradients    4 a trained number
    activations  without checkpointing what each block keeps (`blocks.BlockBytes.saved`, compiled `kept`); with it each block's
                 input, and of compiled blocks attention's output too
    loss chunk   C V e: e = 4 + 2 (+ 4 with a teacher's logits) of fused kernels over bfloat16 heads (4 + 4 + 4 of others), 16 + 4 without
                 kernels; C as in `OutputLossSpec.chunk_rows` (docs/concepts/method.md 3.3)
    recordings   activations and one block's passing bytes again: a recording's pool is its own, and while it is tried the plain
                 passes lie beside it. What the recorded passes need is no part of torch's "in use"
    slack        a fifth of what comes and goes, and 66 MiB a stream that cuBLAS has seen: measured (docs/train/plan.md)

Axes: N supervised rows, C rows of a chunk, V vocabulary rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.losses.divergence import Divergence
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.planning.estimate.blocks import BlockBytes
from student_trainer.planning.estimate.shapes import Shapes

CONTEXT_BYTES = 512 << 20  # of a CUDA context with its libraries, which torch does not count
_LIBRARY_BYTES = 66 << 20  # of cuBLAS, for each stream that it has seen
_SLACK = 0.2  # share of what comes and goes that torch's allocator holds beside it; as the rest of the slack fitted to peaks (docs/train/plan.md)


@dataclass(frozen=True)
class Step:
    """The numbers of a step that decide its memory.

    Attributes:
        sequences, length: of the largest micro-batch, padding included.
        rows: N, supervised rows of it at most.
        accumulation: micro-batches of an update.
        checkpointing, compiled, graphs: of the student's passes.
        fused: the loss runs in kernels of its own, as on a GPU.
        vocab_rows: V that student and teacher share.
        chunk_bytes: `loss.chunk_mb`.
        teacher_logits: the loss makes or reads whole rows of teachers' logits, of this many teachers.
        class_bytes: of a row's figures over classes of ids, of the teacher with another tokenizer that needs most; 0 if there is none.
        teacher_heads_bytes: of output heads of teachers.
        label_bytes: of the teachers' answers about one micro-batch.
        projectors: numbers of projectors, trained beside the student.
        feature_bytes: of what terms on layers hold of a micro-batch.
    """

    sequences: int
    length: int
    rows: int
    accumulation: int = 1
    checkpointing: bool = False
    compiled: bool = True
    graphs: bool = False
    fused: bool = True
    vocab_rows: int = 0
    chunk_bytes: int = 1 << 30
    teacher_logits: int = 1
    class_bytes: int = 0
    teacher_heads_bytes: int = 0
    label_bytes: int = 0
    projectors: int = 0
    feature_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes of a step.

    Attributes:
        parts: by name; those of moments that are not the peak are there too.
        moment: of the peak.
        in_use: in tensors at the peak; a recording's own memory is not counted, as torch does not.
        held: what torch's allocator holds at most: slack and recordings counted in.
        activations_with, activations_without: of all blocks, with checkpointing and without it.
    """

    parts: dict[str, int]
    moment: str
    in_use: int
    held: int
    activations_with: int
    activations_without: int

    @property
    def on_card(self) -> int:
        """What the card must have: held by torch, and the CUDA context."""
        return self.held + self.parts.get("CUDA context", 0)


def estimate(shapes: Shapes, step: Step, *, on_gpu: bool) -> Estimate:
    """See module.

    Raises:
        ModelError: as `Shapes.activations`.
    """
    pass_ = shapes.activations(step.sequences, step.length)
    plain = sum(_of_block(block, step.compiled) * count for block, count in pass_.kinds)
    checkpointed = sum(
        (block.entry + (block.attention if step.compiled else 0)) * count for block, count in pass_.kinds
    )
    activations = (checkpointed if step.checkpointing else plain) + pass_.base.saved
    again = max((_of_block(block, step.compiled) for block, _ in pass_.kinds), default=0) if step.checkpointing else 0
    passing = max((block.passing for block, _ in pass_.kinds), default=0) + shapes.dequantized_bytes
    trained = shapes.trained + step.projectors
    gradients = 4 * trained
    head = 4 * shapes.head_rows * shapes.width if shapes.trains_head else 0
    cast = 2 * shapes.head_rows * shapes.width if shapes.trains_head and shapes.computed_bytes == 2 else 0
    chunk = chunk_bytes(step, shapes.computed_bytes)
    states = step.rows * shapes.width * (shapes.computed_bytes + 4)
    lasting = {
        "weights": shapes.frozen_bytes,
        "float32 masters": 4 * shapes.trained,
        "optimizer": 8 * trained + 4 * shapes.tensors,
        "teachers' heads": step.teacher_heads_bytes,
        "labels under way": step.label_bytes,
        "projectors": 4 * step.projectors,
    }
    lying = gradients if step.accumulation > 1 or step.graphs else 0
    recorded = activations + again + passing if step.graphs else 0
    body = 0 if step.graphs else activations  # recorded passes keep theirs in their own pool
    moments = {
        "loss": body + chunk + states + step.feature_bytes + head + cast + lying,
        "backward": body + (0 if step.graphs else again + passing) + head + step.feature_bytes + lying,
        "end of the backward pass": (gradients if not lying else lying + head * shapes.ties_head)
        + (head if shapes.ties_head else 0),
        "update": gradients + (0 if on_gpu else 8 * shapes.largest),
    }
    moment = max(moments, key=lambda name: moments[name])
    in_use = sum(lasting.values()) + moments[moment]
    slack = 0
    if on_gpu:
        coming = moments[moment] - gradients if moment != "update" else 0
        # Blocks that are kept for the backward pass are alike, and take each other's places.
        coming -= 0 if step.graphs or step.checkpointing else plain - checkpointed
        slack = _LIBRARY_BYTES + round(_SLACK * max(0, coming - (chunk if step.graphs else 0)))
        slack += chunk if shapes.trains_head else 0  # the head's gradient does not fit where a chunk's logits lay
    tried = recorded * 2 + _LIBRARY_BYTES if step.graphs else 0
    parts = lasting | {
        "gradients": gradients,
        "activations": activations,
        "one block in the backward pass": again + passing,
        "loss chunk": chunk,
        "student's head (gradient, cast)": head + cast,
        "states and their gradient": states,
        "terms on layers": step.feature_bytes,
        "recordings": tried,
        "allocator slack": slack,
        "CUDA context": CONTEXT_BYTES if on_gpu else 0,
    }
    return Estimate(
        parts, moment, in_use, in_use + slack + tried, checkpointed + pass_.base.saved, plain + pass_.base.saved
    )


def _of_block(block: BlockBytes, compiled: bool) -> int:
    return block.kept if compiled else block.saved


def chunk_bytes(step: Step, computed_bytes: int) -> int:
    """Bytes of a chunk of logits with its gradient and the teacher's, and of what is summed over classes of ids."""
    if not step.vocab_rows:
        return 0
    gradient = 2 if computed_bytes == 2 else 4
    each = 4 + gradient + (4 if step.teacher_logits else 0) if step.fused else 16
    is_joined = step.teacher_logits > 1 or step.class_bytes > 0
    at_a_time = 12 if step.fused and is_joined else each  # as `joined.adding.chunk_rows`
    rows = OutputLossSpec(Divergence(), chunk_bytes=step.chunk_bytes).chunk_rows(step.vocab_rows, at_a_time)
    held = each + 4 * max(0, step.teacher_logits - 1) + (0 if step.fused else 4)
    return min(rows, step.rows) * (step.vocab_rows * held + step.class_bytes)
