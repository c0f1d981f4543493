"""A small teacher trained from nothing, served over real gRPC, and students that learn from it by the shipped losses.

In: a recipe, sequences with loss masks; out: checked labels, trained students. A plain loop without Trainer, so that five
seeds of every arm fit into minutes: labels of a fixed set are fetched once a transport and reused at every step.
Must never compute a loss that is the product's, nor skip its checks of labels.

Axes: B sequences, L tokens of each (all equally long), N supervised rows, V ids, D width.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from student_trainer.config.losses import LossConfig
from student_trainer.config.training import OptimizationConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, IndexedExample
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack
from student_trainer.labels.rows_on_device import head_on, rows_on
from student_trainer.labels.verify import check_signals
from student_trainer.losses.align import row_index
from student_trainer.losses.head import Head
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import TeacherRows, TopKRows
from student_trainer.model.load import Student
from student_trainer.teachers.artifact_cache import fetch_head
from student_trainer.teachers.features import plan_features
from student_trainer.training.learner import Learner
from student_trainer.training.objective import Objective
from student_trainer.training.trainer import learning_rate_share
from student_trainer.training.windows import MicroBatch, padded
from teacher_server.config.backends import TransformersBackend
from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.loopback import serve
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow

CACHE = Path(__file__).parents[2] / ".cache" / "classroom"
ASKED_AT_ONCE = 64  # sequences of one request
# docs/concepts/method.md 12: the same optimizer for teachers, students and arms.
OPTIMIZATION = OptimizationConfig(learning_rate=3e-3, warmup_steps=30, schedule="cosine", min_lr_share=0.05)
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model; `init_std` is of its initial weights."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    max_positions: int = 64
    tied: bool = True
    init_std: float = 0.02

    def build(self, seed: int) -> Any:
        """The model at its start, a pure function of shape and seed."""
        config = Qwen2Config(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, intermediate_size=self.ffn,
            max_position_embeddings=self.max_positions, tie_word_embeddings=self.tied, initializer_range=self.init_std,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen2ForCausalLM(config)


@dataclass(frozen=True)
class TeacherRecipe:
    """Everything that decides a teacher's weights; `task` names the data and its version."""

    task: str
    shape: Shape
    steps: int
    batch_size: int
    seed: int = 0

    @property
    def folder(self) -> Path:
        text = json.dumps([asdict(self), torch.__version__], sort_keys=True)
        return CACHE / f"{self.task}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def teacher_folder(
    recipe: TeacherRecipe,
    fresh: Callable[[int], tuple[Tensor, Tensor]],
    save_tokenizer: Callable[[Path, int], None] | None = None,
) -> Path:
    """The folder of the trained teacher, from the cache if this very recipe is there.

    Args:
        recipe: how.
        fresh: step -> ids [B, L] and loss mask [B, L], never the same twice.
        save_tokenizer: writes a tokenizer of so many ids into a folder; one word an id if None.
    """
    folder = recipe.folder
    if (folder / "model.safetensors").is_file():
        return folder
    model = recipe.shape.build(recipe.seed)
    optimizer, scheduler = optimization(model, recipe.steps)
    for step in range(recipe.steps):
        ids_BL, mask_BL = fresh(step)
        logits_BLV = model(input_ids=ids_BL).logits[:, :-1]
        labels_BL = ids_BL.masked_fill(~mask_BL, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten())
        take_step(model, optimizer, scheduler, loss)
    partial_folder = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    model.save_pretrained(partial_folder)
    (save_tokenizer or _save_tokenizer)(partial_folder, recipe.shape.vocab)
    with contextlib.suppress(OSError):  # somebody else was faster: theirs is the same
        os.replace(partial_folder, folder)
    shutil.rmtree(partial_folder, ignore_errors=True)
    return folder


def _save_tokenizer(folder: Path, vocab: int) -> None:
    """One word an id: the server wants a tokenizer to describe, nobody here has a text."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{number}": number for number in range(vocab)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(words)).save_pretrained(folder)


def optimization(model: Any, steps: int, more: dict[str, Any] | None = None) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its schedule, the same for everybody; `more` is a group of what is trained beside the model."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZATION.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    if more is not None:
        optimizer.add_param_group(more)
    share = lambda step: learning_rate_share(step, steps, OPTIMIZATION)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def take_step(model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, loss: Tensor) -> None:
    """Backward, clip, step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


# ------------------------------------------------------------------ the wire


class EngineService:
    """A `TeacherService` around one engine, as the edge is around Serve handles."""

    def __init__(self, engine: TeacherEngine) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None

    async def describe(self) -> list[TeacherInfo]:
        return [self._engine.info]

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        return self._engine.info

    async def score(self, call: ScoreCall) -> TeacherSignals:
        self._start()
        return await self._engine.score(call)

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        self._start()
        return self._engine.generate(call)

    def _start(self) -> None:
        if self._loop is None:  # only the server's loop may run the engine
            self._loop = asyncio.get_running_loop()
            self._engine.start()

    def stop(self) -> None:
        """Ends the engine; from outside the server's loop."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._engine.stop(), self._loop).result()

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        return await self._engine.artifact_header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return await self._engine.artifact_bytes(call, offset, size)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        return await self._engine.reader.tokenize(call)


@dataclass(frozen=True)
class Classroom:
    """A served teacher, met by a student.

    Attributes:
        info: as the teacher describes itself.
        head: its output head, fetched over the wire.
    """

    info: TeacherInfo
    head: Head
    _client: TeacherClient
    _loop: asyncio.AbstractEventLoop

    def labels(self, examples: Sequence[Example], spec: SignalSpec) -> TeacherSignals:
        """Labels of all examples in order, over the wire and through the checks of the feed."""
        asked = [pack(examples[start : start + ASKED_AT_ONCE]) for start in range(0, len(examples), ASKED_AT_ONCE)]

        async def ask() -> list[TeacherSignals]:
            return await asyncio.gather(*(self._client.score(self.info, spec, request.batch) for request in asked))

        answers = self._loop.run_until_complete(ask())
        for signals, request in zip(answers, asked, strict=True):
            check_signals(signals, spec, request.batch, request.names)
        return TeacherSignals.join(answers)


@contextlib.contextmanager
def classroom(
    folder: Path, *, dtype: str = "float32", device: str = "cpu", deterministic: bool = True
) -> Iterator[Classroom]:
    """Serves a model folder on a loopback port until the block ends; its head is put on the same device.

    `deterministic` computes every sequence in a forward pass of its own, which takes a CPU five times as long.
    """
    backend = TransformersBackend.model_validate({"model": str(folder), "dtype": dtype, "device": device})
    service = EngineService(TeacherEngine(TeacherConfig(name="teacher", backend=backend, deterministic=deterministic)))
    loop = asyncio.new_event_loop()  # one for all calls and never closed: grpc's poller may still have word for it

    async def meet(address: str) -> Classroom:
        client = TeacherClient(address)
        info = await client.teacher()
        head = await fetch_head(client, info, CACHE)
        return Classroom(info, head_on(head, info.vocab_rows, torch.device(device)), client, loop)

    with serve(service) as server:
        room = loop.run_until_complete(meet(server.address))
        try:
            yield room
        finally:
            loop.run_until_complete(room._client.close())
            service.stop()


# --------------------------------------------------------------- the student


RowsLoss = Callable[[Tensor, Head, TeacherRows], Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        spec: the labels asked for; None for the data's own tokens.
        loss: replaces the shipped loss; for what others do and we do not offer.
    """

    spec: SignalSpec | None = None
    loss: RowsLoss | None = None


@dataclass(frozen=True)
class StudentRecipe:
    """What all arms share."""

    shape: Shape
    steps: int
    batch_size: int


def train_student(
    recipe: StudentRecipe,
    examples: Sequence[Example],
    arm: Arm,
    seed: int,
    room: Classroom,
    order: RunOrder | None = None,
) -> Student:
    """A student after its steps; arms of one seed differ in nothing but their labels and loss, or the order of the rows where one is given."""
    student = Student(recipe.shape.build(1000 + seed), None)
    head_rows = recipe.shape.vocab
    order = order or RunOrder(
        len(examples), batch_size=recipe.batch_size, accumulation=1, epochs=1, max_steps=recipe.steps, seed=seed
    )
    spec = OutputLossSpec() if arm.spec else OutputLossSpec(kd_weight=0.0, sft_weight=1.0)
    labels = (
        None
        if arm.spec is None
        else rows_on(LabelTensors.of(room.labels(examples, arm.spec)), room.head, torch.device("cpu"))
    )
    first_row = np.cumsum([0, *(int(example.loss_mask.sum()) for example in examples)])
    optimizer, scheduler = optimization(student.model, recipe.steps)
    for step in range(recipe.steps):
        indices = order.batch(step)
        packed = pack([examples[index] for index in indices]).batch
        ids_BL = torch.from_numpy(packed.token_ids_T.astype(np.int64)).reshape(len(indices), -1)
        rows_N = torch.from_numpy(row_index(packed.cu_lengths_B1, packed.wanted_T, ids_BL.shape[1]))
        labels_N = torch.from_numpy(packed.labels_N()).long()
        state_ND = student.states(ids_BL).flatten(0, 1)[rows_N]
        head = student.head(head_rows)
        kept_N = np.concatenate([np.arange(first_row[index], first_row[index + 1]) for index in indices])
        teacher = None if labels is None else labels.take(torch.from_numpy(kept_N))
        if arm.loss is not None:
            assert teacher is not None
            total = arm.loss(state_ND, head, teacher)
        else:
            ones_N = torch.ones(len(labels_N))
            result = output_loss(state_ND, head, teacher, labels_N, ones_N, float(len(labels_N)), spec)
            if result.integrity is not None:
                result.integrity.check()
            total = result.total
        take_step(student.model, optimizer, scheduler, total)
    student.model.eval()
    return student


def train_by_terms(
    recipe: StudentRecipe, examples: Sequence[Example], section: dict[str, Any], seed: int, room: Classroom
) -> Student:
    """As `train_student`, by the product's own terms of a config's section `loss`, those on layers among them, from `hidden` labels."""
    loss = LossConfig.model_validate(section)
    spec = spec_of("hidden", recipe.shape.vocab)
    plan = plan_features(loss.features, room.info, recipe.shape.vocab, recipe.shape.layers) if loss.features else None
    objective = Objective(loss, recipe.shape.vocab, spec.signals, plan, recipe.steps)
    if plan is not None:
        spec = replace(spec, signals=(*spec.signals, *plan.signals.values()))
    student = Student(recipe.shape.build(1000 + seed), None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)  # of projectors
        learner = Learner(student, objective.terms(student), teacher_head=room.head)
    labels = room.labels(examples, spec).cut(pack(examples).batch)
    order = RunOrder(
        len(examples), batch_size=recipe.batch_size, accumulation=1, epochs=1, max_steps=recipe.steps, seed=seed
    )
    group = learner.projector_group(OPTIMIZATION.learning_rate)
    optimizer, scheduler = optimization(student.model, recipe.steps, group)
    for step in range(recipe.steps):
        indices = order.batch(step)
        batch = padded(MicroBatch.of(step, [IndexedExample(index, examples[index]) for index in indices]), pad_id=0)
        answer = LabelTensors.of(TeacherSignals.join([labels[index] for index in indices]))
        found = learner(replace(batch, labels=answer), batch.weight, step)
        for evidence in found.evidence:
            evidence.check()
        take_step(learner, optimizer, scheduler, found.loss)
    student.model.eval()
    return student


def renormalised_top_k(state_ND: Tensor, head: Head, rows: TeacherRows) -> Tensor:
    """Forward KL over the kept ids alone, both sides renormalised: what others do with truncated labels."""
    assert isinstance(rows, TopKRows)
    log_q_NK = (state_ND @ head.weight_VD.T).gather(-1, rows.topk_ids_NK).log_softmax(-1)
    log_p_NK = rows.topk_logits_NK.log_softmax(-1)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1).mean()


# --------------------------------------------------------------- statistics


T_975 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # by degrees of freedom


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of first - second over seeds, and the ends of its 95 % t-interval."""
    differences = np.subtract(first, second)
    mean, count = float(differences.mean()), len(differences)
    half = T_975[count - 1] * float(differences.std(ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def table(found: dict[str, list[float]]) -> str:
    """Arms with mean, sd and every seed."""
    lines = [f"{'arm':<26}{'mean':>8}{'sd':>8}   seeds"]
    for name, values in found.items():
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        seeds = " ".join(f"{value:.4f}" for value in values)
        lines.append(f"{name:<26}{np.mean(values):>8.4f}{sd:>8.4f}   {seeds}")
    return "\n".join(lines)
