"""How much each layer of a teacher changes what it reads: block influence, 1 - cos(state before, state after), on rows of a sample.

In: a teacher and token sequences; out: one number per layer (ShortGPT, Men et al. 2024, section 3: the layers of least influence are the
ones to take out). The teacher is loaded, and computes one sequence at a time, so that nothing is padded.
Axes: T tokens, D width, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import parse_source
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import ModelError
from student_trainer.making.teacher import TeacherFiles


def sample_ids(teacher: TeacherFiles, sample: str, max_tokens: int) -> list[Tensor]:
    """The rows of a sample (`path` or `path#N`) as token ids, by the teacher's own template; longer rows are refused.

    Raises:
        DataError: a source or row that cannot be read, or a row above `max_tokens`.
    """
    data = build_dataset([parse_source(sample)], load_tokenizer(teacher.folder), max_tokens=max_tokens)
    return [torch.from_numpy(row.example.token_ids.astype("int64")) for row in data]


@torch.no_grad()
def block_influence(
    teacher: TeacherFiles,
    blocks_of: Callable[[Any], nn.ModuleList],
    rows: Sequence[Tensor],
    tell: Callable[[int], None],
) -> list[float]:
    """Mean over all tokens of 1 - cos(input state, output state), per layer; float64.

    Args:
        teacher: loaded in the dtype of its config on a GPU, in float32 on a CPU.
        blocks_of: its layers, of the loaded model.
        rows: token ids, [T] each.
        tell: called with the rows done.

    Raises:
        ModelError: it cannot be loaded, has no memory, or its states are not finite.
    """
    transformers_logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            teacher.folder, dtype="auto" if on_gpu else torch.float32, trust_remote_code=False, use_safetensors=True
        )
        model = (model.cuda() if on_gpu else model).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"--from {teacher.name}: cannot be loaded: {str(error)[:300]}") from error
    blocks = blocks_of(model)
    sums_L = torch.zeros(len(blocks), dtype=torch.float64)
    with _measured(blocks, sums_L):
        for done, ids_T in enumerate(rows, 1):
            model(input_ids=ids_T[None].to(model.device), use_cache=False)
            tell(done)
    if not torch.isfinite(sums_L).all():
        raise ModelError(
            f"--from {teacher.name}: its states are not finite, from layer {int((~sums_L.isfinite()).nonzero()[0])} on"
        )
    return [float(value) for value in sums_L / sum(row.numel() for row in rows)]


@contextlib.contextmanager
def _measured(blocks: nn.ModuleList, sums_L: Tensor) -> Iterator[None]:
    """Adds to `sums_L` what the layers change in the passes of this block."""

    def hook(number: int) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before_TD = (args[0] if args else kwargs["hidden_states"])[0].double()
            after_TD = (output[0] if isinstance(output, tuple) else output)[0].double()
            sums_L[number] += (1 - torch.cosine_similarity(before_TD, after_TD, dim=-1)).sum().cpu()

        return add

    hooks = [block.register_forward_hook(hook(number), with_kwargs=True) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
