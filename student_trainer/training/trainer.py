"""The training loop: transformers' Trainer, with labels joined per window and our chunked loss in place of the model's.

In: a student, the terms of its loss, prepared windows, a feed of labels; out: checkpoints and a log. It never asks a teacher
itself nor looks at the data, and nothing in it draws a random number outside the model.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainingArguments

from student_trainer.config.run import TrainConfig
from student_trainer.config.training import OptimizationConfig
from student_trainer.errors import ConfigError, NonFiniteError, RunError
from student_trainer.files import disk_trouble_named
from student_trainer.labels.prefetch import AheadFeed
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.term import LossTerm
from student_trainer.losses.total import Total
from student_trainer.model.load import Student
from student_trainer.model.speed import cuda_graphs
from student_trainer.model.speed.cuda_recorder import CudaRecorder
from student_trainer.training.checkpoints.checkpoint_rotation import KeepingTrainer
from student_trainer.training.checkpoints.stopping import Stopping
from student_trainer.training.deferred_checks import DeferredChecks
from student_trainer.training.joined.joiner import Joiner, request_of
from student_trainer.training.learner import Learner
from student_trainer.training.metrics import Meter
from student_trainer.training.reporting.out_of_memory import is_out_of_memory, what_to_lower
from student_trainer.training.run_folder import LOG_NAME, finite_or_none, log_line
from student_trainer.training.windows import SequenceNumbers, WindowSource, numbers_only, padded

# What accelerate asks for the number of processes.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class DistillationTrainer(KeepingTrainer):
    """See module; built by `run.py`.

    Args:
        config: of the run.
        student: what is trained.
        windows: what is learned from at which step.
        terms: of the loss.
        arguments: of `training_arguments`, if they were made already.
        open_feed: makes a feed that starts at a micro-batch; None if no loss needs a teacher.
        ask: hands the feed a request it cannot make itself; None if it can make them all.
        teacher_head: the teacher's output head, for `hidden` labels.
        joiner: makes labels of the answers of several teachers; None in a run with one.
        measure: figures of the held-out data; None if there are none.
        callbacks: transformers callbacks.
        on_trouble: called with a sentence that says what makes the run slower than it might be, or its figures less than they should be.

    Attributes:
        batch_shape: of the last micro-batch that was computed, in words; empty before the first.
        stopping: told of an interruption, ends the run between two steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        windows: WindowSource,
        terms: Sequence[LossTerm],
        *,
        arguments: TrainingArguments | None = None,
        open_feed: Callable[[int], AheadFeed[Any]] | None = None,
        ask: Callable[[int, LabelRequest], None] | None = None,
        teacher_head: Head | None = None,
        joiner: Joiner | None = None,
        measure: Callable[[], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        on_trouble: Callable[[str], None] = print,
    ) -> None:
        self._config = config
        self._student = student
        self._windows = windows
        self._open_feed = open_feed
        self._ask = ask
        self._feed: AheadFeed[Any] | None = None
        self._measure = measure
        self._evidence: tuple[Integrity, ...] = ()
        self._meter = Meter()
        self._last_metrics: tuple[int, dict[str, float]] = (-1, {})
        self._on_trouble, self._told = on_trouble, set[str]()
        self.batch_shape = ""
        self._window: list[tuple[Tensor, tuple[str, ...]]] = []
        self.stopping = Stopping(self.evaluate)
        self._learner = Learner(
            student,
            terms,
            narrowed=torch.bfloat16 if config.train.bf16 else None,
            teacher_head=teacher_head,
            likeliest=config.labels.k if config.labels.extra_ids else 0,
            joiner=joiner,
        )
        self._verdicts = DeferredChecks(
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            skip=config.train.nonfinite == "skip",
            max_skipped=config.train.max_skipped,
            explain=self._why_not_finite,
        )
        self._length = cuda_graphs.padded_length if student.is_graphed else lambda longest: longest
        super().__init__(
            model=self._learner,
            args=arguments or training_arguments(config, windows.steps, evaluates=measure is not None),
            train_dataset=SequenceNumbers(windows),
            eval_dataset=[] if measure is None else [None],  # only asked whether there is one: see `evaluate`
            data_collator=numbers_only,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(self.stopping)
        self.loss_is_scaled_for_ga = True  # our loss divides by the rows of the whole window
        self.can_return_loss = True
        if student.is_graphed:
            trained = [p for p in student.body.parameters() if p.requires_grad]
            self._learner.passes = cuda_graphs.GraphedBody(
                self._learner.plain, trained, CudaRecorder(), on_trouble, is_ready=lambda: self.state.global_step > 0
            )

    # ------------------------------------------------------------------ data

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], float]:
        """The micro-batches of one window with their labels, and Z, the weight of its supervised rows (docs/concepts/method.md 1.5)."""
        for _ in range(num_batches):
            next(epoch_iterator)  # transformers counts them
        step = self.state.global_step
        with self.stopping.waiting():
            window = self._windows.window(step)
        assert (window.step, len(window.batches)) == (step, num_batches), "the window is of another step, or cut short"
        numbers = [batch.number for batch in window.batches]
        shares_rows = self._config.train.packing
        batches = [
            padded(batch, self._student.pad_id, self._length, shares_rows=shares_rows) for batch in window.batches
        ]
        self._meter.tokens += sum(batch.request.batch.tokens for batch in batches)
        if self._ask is not None:
            for number, batch in zip(numbers, batches, strict=True):
                named = self._learner.with_own_ids(batch, self._config.labels.extra_ids, step)
                self._ask(number, replace(batch.request, batch=named))
        if self._open_feed is not None:
            batches = [
                replace(batch, labels=self._take(number)) for number, batch in zip(numbers, batches, strict=True)
            ]
        return [{"batch": batch} for batch in batches], sum(batch.weight for batch in batches)

    def _take(self, number: int) -> Any:
        """What the teacher has answered about micro-batch `number`, or several have; it counts how long it was waited for."""
        if self._feed is None:
            assert self._open_feed is not None
            self._feed = self._open_feed(number)
        stats = self._feed.stats
        before_s, alone_before_s = stats.wait_s, dict(stats.alone_s)
        with self.stopping.waiting():
            labels = self._feed.take(number)
        self._meter.waited_s += stats.wait_s - before_s
        alone_s = self._meter.waited_alone_s
        for name, waited_s in stats.alone_s.items():
            alone_s[name] = alone_s.get(name, 0.0) + waited_s - alone_before_s[name]
        self._meter.labels.add(labels.usage)
        return labels.ready

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of one micro-batch, normalised by the rows of its window."""
        total: Total = model(inputs["batch"], num_items_in_batch, self.state.global_step)
        self._evidence = total.evidence
        self._meter.add(total.parts, total.loss)
        return total.loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Takes accelerate's autocast from around the learner, which narrows the student's passes itself and never its losses."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._learner.__dict__.pop("forward", None)
        return prepared

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """An estimate for the log, of padding too."""
        tokens = inputs["batch"].input_ids_BL.numel()
        return 6 * tokens * int(self._student.model.num_parameters(exclude_embeddings=True))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass, and the verdicts on labels that are there by now; bad ones are never learned from.

        Raises:
            TeacherHeadMismatch: labels are not what the teacher's head makes of its states; names the sample.
        """
        batch = inputs["batch"]
        sequences, tokens = batch.input_ids_BL.shape
        self.batch_shape = f"{sequences} {'rows' if batch.packing else 'sequences'}, padded to {tokens} tokens"
        loss = super().training_step(model, inputs, num_items_in_batch)
        for evidence in self._evidence:
            self._verdicts.add(evidence, request_of(batch, evidence.teacher))
        self._window.append((loss, batch.request.names))
        if self._config.train.nonfinite == "skip":  # transformers adds it to a sum that lasts for the whole run
            return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the window's gradients; decides whether the optimizer, which is asked next, learns from them.

        Raises:
            NonFiniteError: they, or the loss of a micro-batch, are not finite; before the weights are touched.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        losses, names = zip(*self._window, strict=True)
        self._window = []
        left_out = self._verdicts.end_window(self.state.global_step + 1, losses, norm, names)
        self._meter.end_window(left_out)
        if (
            not left_out.is_cuda and left_out
        ):  # a GPU's optimizer is given `withheld`; any passes over what has no gradient
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    def create_optimizer(self, model: Any = None) -> Any:
        """As configured, projectors in a group of their own; on a GPU it passes over a step whose numbers or labels are refused."""
        optimizer = super().create_optimizer(self._student.model)
        group = self._learner.projector_group(self._config.train.learning_rate)
        if group is not None:
            optimizer.add_param_group(group)
        if self._verdicts.withheld.is_cuda:
            # torch's own word for a step that a fused optimizer leaves out
            optimizer.found_inf = self._verdicts.withheld
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate as a pure function of the step."""
        settings = self._config.train
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: learning_rate_share(step, num_training_steps, settings)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # -------------------------------------------------------- evaluation, logs

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Figures of the held-out data, logged as `eval_*`; those that are not finite are told of.

        Raises:
            TeacherHeadMismatch: the teacher's labels of it are not its head's.
            NonFiniteError: the student's own likelihoods are not finite, and `train.nonfinite` is `stop`.
            RunError: there is no memory for it.
        """
        assert self._measure is not None
        self._verdicts.settle()
        began_s = time.perf_counter()
        self.model.eval()
        try:
            with self.stopping.waiting(then_in_step=self.is_in_train):
                metrics = {f"eval_{name}": value for name, value in self._measure().items()}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory while measuring the held-out rows after step {self.state.global_step}: "
                f"{' '.join(str(error).split())[:200]}; {what_to_lower(self._config, 'measuring')}"
            ) from error
        self.model.train()
        self.log(dict(metrics))
        self._check_held_out(metrics)
        self._meter.started_s += time.perf_counter() - began_s  # rates are of training alone
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._last_metrics = (self.state.global_step, metrics)
        return metrics

    def _check_held_out(self, metrics: dict[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not bad:
            return
        told = f"held-out figures after step {self.state.global_step} are not finite: {', '.join(bad)}"
        if "eval_nll_per_token" in bad and self._config.train.nonfinite == "stop":
            raise NonFiniteError(f"{told}{self._why_not_finite()}")
        self._on_trouble(told)

    def last_metrics(self) -> dict[str, float]:
        """Figures of the model as it is now; measured unless the last step was followed by an evaluation."""
        step, metrics = self._last_metrics
        return metrics if step == self.state.global_step else self.evaluate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss and the rates, and writes one line of train_log.jsonl."""
        self._verdicts.settle()
        if "loss" in logs:
            logs |= self._meter.figures()
            self._meter = Meter()
            if self._config.train.nonfinite == "skip":
                logs["skipped_steps"] = self._verdicts.take_skipped()
        self.state.epoch = self._windows.epoch_at(self.state.global_step)  # to transformers the run is one epoch
        super().log(logs, start_time)
        self.state.log_history[-1] = finite_or_none(self.state.log_history[-1])
        path = Path(self.args.output_dir) / LOG_NAME
        with disk_trouble_named(str(path), self._room_and_resume), path.open("a") as file:
            file.write(log_line({"step": self.state.global_step, **logs}))

    def settle(self) -> None:
        """Waits for the verdicts on all labels used so far; raises as `training_step`."""
        self._verdicts.settle()

    def close(self) -> None:
        """Ends the feed and the source of windows."""
        if self._feed is not None:
            self._feed.close()
        self._windows.close()


def learning_rate_share(step: int, steps: int, settings: OptimizationConfig) -> float:
    """The share of the peak learning rate at optimizer step `step` of `steps`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    falling = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]
    return settings.min_lr_share + (1 - settings.min_lr_share) * falling


def training_arguments(config: TrainConfig, steps: int, *, evaluates: bool) -> TrainingArguments:
    """Our settings in transformers' words; what it would do on its own and we do ourselves is switched off.

    Raises:
        RunError: several processes.
        ConfigError: transformers refuses a setting on this machine.
    """
    check_single_process()
    try:
        arguments = _arguments(config, steps, evaluates=evaluates)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())[:300]}") from error
    if arguments.world_size > 1:
        raise RunError(f"{arguments.world_size} processes: several are not supported yet; start one")
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would change what a micro-batch is
    return arguments


def check_single_process() -> None:
    """Refuses what a launcher of several processes says in the environment, before anybody waits for the others.

    Raises:
        RunError: naming the variable.
    """
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "")
        if value.strip() not in ("", "0", "1"):
            raise RunError(f"{name}={value}: several processes are not supported yet; start one, or unset the variable")


def _arguments(config: TrainConfig, steps: int, *, evaluates: bool) -> TrainingArguments:
    settings = config.train
    return TrainingArguments(
        output_dir=str(config.run.output_dir),
        seed=config.run.seed,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_steps,
        eval_strategy="steps" if evaluates and settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=None,  # ours are rotated only after the new one counts
        report_to="none",  # `tracking/trackers.py`
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        disable_tqdm=True,
        dataloader_num_workers=0,  # labels are joined in this process; workers after a channel may crash (grpc#32992)
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        log_level="error",
    )
