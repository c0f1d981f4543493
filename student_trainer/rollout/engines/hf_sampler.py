"""`engine: hf`: the student writes in this process, by a copy of its trained weights, over transformers' key-value cache.

In: prompts as token ids; out: completions. What is frozen is shared with the student that trains; what is trained is a copy, so that
writing goes on while the optimizer steps. Rows are left-padded; distinct prompts are read once, and rows that are done leave the batch.
Must never draw from torch's generators, nor call anything that changes transformers for the thread that trains.

Axes: B rows being written, L padded prompt, V vocabulary rows, M likeliest ids.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from student_trainer.errors import RolloutError
from student_trainer.losses.head import Head
from student_trainer.model.load import Student
from student_trainer.rollout.engines.draw import draw
from student_trainer.rollout.sample import Rollout, RolloutFailure, RolloutPrompt
from student_trainer.schedules import uniforms

SLOT_TOKENS = 1 << 20  # slots of the random stream that belong to one sample; more tokens than any completion has
USUAL_BATCH = 32  # sequences at a time
_PROBE_TOLERANCE = 1e-2  # of the largest logit: bfloat16 rounds to 2^-8


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; a sample is a pure function of these, the weights, its prompt and its place in the run.

    Attributes:
        seed: of the run.
        max_new_tokens: of a completion.
        temperature, top_p: as in `draw.draw`.
        stop_ids: each ends a completion, and stays in it.
        likeliest: M, own likeliest ids that are told of each token.
        batch: sequences that are written at a time.
    """

    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: frozenset[int] = frozenset()
    likeliest: int = 0
    batch: int = USUAL_BATCH

    def uniforms(self, prompts: Sequence[RolloutPrompt]) -> np.ndarray:
        """float64 [len(prompts), max_new_tokens], one for each token that may be drawn."""
        places = np.arange(self.max_new_tokens)
        return np.stack([uniforms(self.seed, "rollout", p.step, p.slot * SLOT_TOKENS + places) for p in prompts])


class HfSampler:
    """A `Sampler`; see module.

    Args:
        student: whose trained weights are copied now, as version 0.
        sampling: how tokens are drawn.
        vocab_rows: V, ids that may be drawn: those that student, teacher and tokenizer share.
        positions: longest sequence the student can write; None if it knows no limit.
        narrowed: dtype of autocast around its passes, as the learner's; None for none.

    Raises:
        RolloutError: its cache gives other logits than its whole passes, or there is no memory for the copy.
    """

    def __init__(
        self,
        student: Student,
        sampling: Sampling,
        vocab_rows: int,
        *,
        positions: int | None = None,
        narrowed: torch.dtype | None = None,
    ) -> None:
        self.version = 0
        self._sampling = sampling
        self._vocab_rows = vocab_rows
        self._positions = positions
        self._narrowed = narrowed
        self._closed = False
        with _memory_named("for a copy of the trained weights"):
            self._student = replace(student, model=_copied(student.model), is_graphed=False)
        self._trained = {name: p for name, p in self._student.model.named_parameters() if p.requires_grad}
        rounded = narrowed or student.narrowed
        if rounded is not None:
            _narrow_products(self._student.causal_lm, rounded)
        for parameter in self._trained.values():
            parameter.requires_grad_(False)
        self._student.model.eval()
        self._device = self._student.outline.device
        self._takes_positions = "position_ids" in inspect.signature(self._student.body.forward).parameters
        self._stops = torch.tensor(sorted(sampling.stop_ids), dtype=torch.int64, device=self._device)
        if self._device.type == "cuda":  # said of every sum on a GPU; those of `draw` are in a fixed order
            warnings.filterwarnings("ignore", message="cumsum_cuda_kernel does not have a deterministic implementation")
        # A stream of its own, so that the device writes between the kernels of a step, not behind them.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with self._ready():
            self._probe()

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See `Sampler`; the tensors may be the student's own, and are read before this returns."""
        if weights.keys() != self._trained.keys():
            odd = sorted(weights.keys() ^ self._trained.keys())
            raise RolloutError(
                f"weights of version {version} are not those of the student: {len(odd)} differ, {odd[0]} first"
            )
        with self._ready():
            for name, parameter in self._trained.items():
                if weights[name].shape != parameter.shape:
                    raise RolloutError(
                        f"weights of version {version}: {name} has the shape {list(weights[name].shape)}, not {list(parameter.shape)}"
                    )
                parameter.copy_(weights[name])
        self.version = version

    @torch.no_grad()
    def sample(self, prompts: Sequence[RolloutPrompt]) -> list[Rollout | RolloutFailure]:
        """See `Sampler`. Batches are cut from the prompts by length: a pure function of the prompts, as what rounding makes of them."""
        found: dict[int, Rollout | RolloutFailure] = {}
        good = []
        for number, prompt in enumerate(prompts):
            why = self._hindrance(prompt)
            if why:
                found[number] = RolloutFailure(prompt, why)
            else:
                good.append(number)
        good.sort(key=lambda number: (prompts[number].token_ids.size, number))
        size = self._sampling.batch
        for start in range(0, len(good), size):
            some = good[start : start + size]
            what = f"to write {len(some)} completions of {self._sampling.max_new_tokens} tokens at a time: lower on_policy.batch={size}"
            with _memory_named(what), self._ready():
                written = self._write([prompts[number] for number in some])
            found.update(zip(some, written, strict=True))
        return [found[number] for number in range(len(prompts))]

    def close(self) -> None:
        """Whoever is writing is told with a RolloutError before the next token."""
        self._closed = True

    def _hindrance(self, prompt: RolloutPrompt) -> str:
        """Why a prompt cannot be answered; empty if it can."""
        tokens, most = prompt.token_ids.size, self._sampling.max_new_tokens
        if not tokens:
            return "its prompt is empty"
        if self._positions is not None and tokens + most > self._positions:
            return (
                f"its prompt of {tokens} tokens and on_policy.max_new_tokens={most} are more than the {self._positions} positions of the "
                "student"
            )
        return ""

    def _write(self, prompts: list[RolloutPrompt]) -> list[Rollout | RolloutFailure]:
        """One completion for each of at most `batch` prompts."""
        sampling, count = self._sampling, len(prompts)
        uniform_BT = torch.from_numpy(sampling.uniforms(prompts)).to(self._device)
        ids_BT = torch.zeros((count, sampling.max_new_tokens), dtype=torch.int64, device=self._device)
        logp_BT = torch.zeros((count, sampling.max_new_tokens), device=self._device)
        kept_BTM = torch.zeros(
            (count, sampling.max_new_tokens, sampling.likeliest), dtype=torch.int32, device=self._device
        )
        length_B = torch.zeros(count, dtype=torch.int64, device=self._device)
        finished_B = torch.zeros(count, dtype=torch.bool, device=self._device)
        broken_B = torch.zeros(count, dtype=torch.bool, device=self._device)
        passes = _Passes(self._student.body, self._takes_positions)
        head = self._student.head(self._vocab_rows)
        row_B = torch.arange(count, device=self._device)  # which completion each row of the batch writes
        alive_B = torch.ones(count, dtype=torch.bool, device=self._device)
        state_BD = passes.read(*self._padded(prompts))
        for place in range(sampling.max_new_tokens):
            if self._closed:
                raise RolloutError("on_policy.engine=hf: the sampler was closed")
            z_BV = self._logits(head, state_BD)
            bad_B = ~torch.isfinite(z_BV).all(-1)
            z_BV = z_BV.masked_fill(bad_B[:, None], 0.0)
            drawn_B, found_B = draw(z_BV, uniform_BT[row_B, place], sampling.temperature, sampling.top_p)
            broken_B[row_B] |= alive_B & bad_B
            alive_B = alive_B & ~bad_B
            ids_BT[row_B, place] = drawn_B
            logp_BT[row_B, place] = found_B
            if sampling.likeliest:
                kept_BTM[row_B, place] = z_BV.topk(sampling.likeliest, dim=-1).indices.int()
            length_B[row_B] += alive_B
            stops_B = alive_B & torch.isin(drawn_B, self._stops)
            finished_B[row_B] |= stops_B
            alive_B = alive_B & ~stops_B
            left = int(alive_B.sum())
            if not left or place + 1 == sampling.max_new_tokens:
                break
            if 2 * left <= len(row_B):
                keep = alive_B.nonzero()[:, 0]
                passes.keep(keep)
                row_B, drawn_B, alive_B = row_B[keep], drawn_B[keep], alive_B[keep]
            state_BD = passes.step(drawn_B)
        return self._results(prompts, ids_BT, logp_BT, kept_BTM, length_B, finished_B, broken_B)

    def _results(
        self,
        prompts: list[RolloutPrompt],
        ids_BT: Tensor,
        logp_BT: Tensor,
        kept_BTM: Tensor,
        length_B: Tensor,
        finished_B: Tensor,
        broken_B: Tensor,
    ) -> list[Rollout | RolloutFailure]:
        ids, logp, kept = ids_BT.int().cpu().numpy(), logp_BT.cpu().numpy(), kept_BTM.cpu().numpy()
        found: list[Rollout | RolloutFailure] = []
        for b, (prompt, n, finished, broken) in enumerate(
            zip(prompts, length_B.tolist(), finished_B.tolist(), broken_B.tolist(), strict=True)
        ):
            if broken:
                found.append(
                    RolloutFailure(prompt, f"the student's logits after {n} tokens of its completion are not finite")
                )
                continue
            likeliest = kept[b, :n].copy() if self._sampling.likeliest else None
            found.append(Rollout(prompt, ids[b, :n].copy(), logp[b, :n].copy(), finished, self.version, likeliest))
        return found

    def _padded(self, prompts: Sequence[RolloutPrompt]) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct prompts, left-padded: ids [U, L], which of them are tokens [U, L], and which prompt each row has [B]."""
        distinct: dict[bytes, int] = {}
        index_B = [distinct.setdefault(p.token_ids.astype(np.int32).tobytes(), len(distinct)) for p in prompts]
        rows = [np.frombuffer(content, np.int32) for content in distinct]
        longest = max(row.size for row in rows)
        ids_UL = np.full((len(rows), longest), self._student.pad_id, np.int64)
        mask_UL = np.zeros((len(rows), longest), np.int64)
        for u, row in enumerate(rows):
            ids_UL[u, longest - row.size :] = row
            mask_UL[u, longest - row.size :] = 1
        ids, mask, index = (
            torch.as_tensor(array, device=self._device) for array in (ids_UL, mask_UL, np.asarray(index_B))
        )
        return ids, mask, index

    def _logits(self, head: Head, state_BD: Tensor) -> Tensor:
        """float32 [B, V]."""
        state_BD = state_BD if self._student.narrowed is None else state_BD.to(self._student.narrowed)
        return head.logits(state_BD).float()

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """What passes and copies run under; all of it is done when the block ends."""
        if self._stream is None:
            with self._computing():
                yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream), self._computing():
            yield
            self._stream.synchronize()

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._student.computing())
            if self._narrowed is not None:
                stack.enter_context(torch.autocast(self._device.type, self._narrowed, cache_enabled=False))
            yield

    @torch.no_grad()
    def _probe(self) -> None:
        """Tries that padding and cache change no logits.

        Raises:
            RolloutError: naming the architecture and by how much.
        """
        ids = np.arange(3, 9, dtype=np.int32) % max(4, min(self._vocab_rows, 1000))
        prompts = [RolloutPrompt(0, slot, part, "probe") for slot, part in enumerate((ids[:5], ids[2:4]))]
        kind = type(self._student.causal_lm).__name__
        head = self._student.head(self._vocab_rows)
        try:
            passes = _Passes(self._student.body, self._takes_positions)
            passes.read(*self._padded(prompts))
            token = torch.full((2,), int(ids[5]), device=self._device)
            cached_BV = self._logits(head, passes.step(token))
            whole = [
                self._student.body(input_ids=torch.as_tensor(np.append(p.token_ids, ids[5])[None].astype(np.int64), device=self._device),
                                   use_cache=False).last_hidden_state[:, -1]
                for p in prompts
            ]  # fmt: skip
            whole_BV = self._logits(head, torch.cat(whole))
        except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
            raise RolloutError(
                f"on_policy.engine=hf: {kind} cannot write with a key-value cache: {str(error)[:200]}"
            ) from error
        off = float((cached_BV - whole_BV).abs().max() / whole_BV.abs().max().clamp_min(1e-6))
        is_exact = self._narrowed is None and self._student.narrowed is None and head.weight_VD.dtype == torch.float32
        if not off <= _PROBE_TOLERANCE * (1 if is_exact else 8):
            raise RolloutError(
                f"on_policy.engine=hf: {kind} with a key-value cache and left padding gives logits that differ by {off:.1%} from those of "
                "whole passes, so its samples would not be its own; set on_policy.engine=vllm"
            )


class _Passes:
    """The passes of one batch: the prompts, then one token of every row at a time."""

    def __init__(self, body: Any, takes_positions: bool) -> None:
        self._body = body
        self._takes_positions = takes_positions
        self._cache = DynamicCache(config=body.config.get_text_config(decoder=True))
        self._mask_BL = self._position_B = torch.zeros(0)

    def read(self, ids_UL: Tensor, mask_UL: Tensor, index_B: Tensor) -> Tensor:
        """[B, D], the states at the ends of the prompts; row b has prompt index_B[b]."""
        position_UL = (mask_UL.cumsum(-1) - 1).clamp_min(0)
        state_UD = self._pass(ids_UL, mask_UL, position_UL)[:, -1]
        self._mask_BL, self._position_B = mask_UL, position_UL[:, -1]
        if len(index_B) == len(ids_UL):
            return state_UD
        self.keep(index_B)
        return state_UD[index_B]

    def step(self, token_B: Tensor) -> Tensor:
        """[B, D], the states behind one more token of every row."""
        self._mask_BL = torch.cat([self._mask_BL, torch.ones_like(self._mask_BL[:, :1])], -1)
        self._position_B = self._position_B + 1
        return self._pass(token_B[:, None], self._mask_BL, self._position_B[:, None])[:, -1]

    def keep(self, index_B: Tensor) -> None:
        """Goes on with these rows, in this order; one may come several times."""
        self._cache.batch_select_indices(index_B)
        self._mask_BL, self._position_B = self._mask_BL[index_B], self._position_B[index_B]

    def _pass(self, ids_BL: Tensor, mask_BL: Tensor, position_BL: Tensor) -> Tensor:
        positions = {"position_ids": position_BL} if self._takes_positions else {}
        outputs = self._body(
            input_ids=ids_BL, attention_mask=mask_BL, past_key_values=self._cache, use_cache=True, **positions
        )
        return outputs.last_hidden_state


def _copied(model: Any) -> Any:
    """The model with trained parameters of its own; frozen ones, buffers and compiled functions are shared."""
    shared = [p for p in model.parameters() if not p.requires_grad]
    shared += [
        value
        for module in model.modules()
        for value in module.__dict__.values()
        if callable(value) and hasattr(value, "works")
    ]
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def _narrow_products(causal_lm: Any, dtype: torch.dtype) -> None:
    """Holds trained float32 weights that autocast would round to `dtype` in every product as rounded ones: the same bits, at every token.

    Those that something else reads too stay as they are: an embedding, the output head with its adapter, and adapters whose product peft
    makes in float32: of what is no linear layer, such as a stack of experts, and those of another kind, such as DoRA.
    """
    modules = list(causal_lm.modules())
    adapted = [m for m in modules if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    apart = [m for m in adapted if not isinstance(m.base_layer, nn.Linear) or getattr(m, "lora_variant", None)]
    whole = [causal_lm.get_output_embeddings(), *(part for m in apart for part in (m.lora_A, m.lora_B))]
    kept = {id(p) for module in whole for p in module.parameters()}
    kept |= {id(p) for m in modules if type(m) is not nn.Linear for p in m.parameters(recurse=False)}
    for module in modules:
        for parameter in module.parameters(recurse=False) if type(module) is nn.Linear else ():
            if parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _memory_named(what: str) -> Iterator[None]:
    """Turns a lack of memory into an error that names what it was for."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RolloutError(f"on_policy.engine=hf: no memory {what}") from error
