"""The trainer's configuration: frozen, strict, parsed before torch is imported.

In: a YAML file and `section.field=value` overrides; out: `TrainConfig`. An unknown key is an error
that names the key; nothing here builds anything.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from student_trainer.config.files import Settings, parse_as, read_tree
from student_trainer.errors import ConfigError
from teacher_wire.transport.proxy import AUTO, NONE, proxy_url

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise ValueError(f"there is no such home directory: {error}") from error


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(_at_home(path)))


# `~` is the home directory wherever a path is read; and what a run writes stays where it was named, whoever changes directory.
HomePath = Annotated[Path, AfterValidator(_at_home)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
HomeText = Annotated[str, AfterValidator(lambda text: str(_at_home(Path(text))) if text.startswith("~") else text)]


class _Strict(Settings):
    """A section; see `Settings`."""


class RunConfig(_Strict):
    """Where the run lives and what makes it repeatable.

    Attributes:
        output_dir: folder of this run; must not hold another run. Kept absolute, as `cache_dir`; `~` is the home directory.
        seed: of initialisation, order and dropout.
        cache_dir: shared by all runs of this machine (labels, output heads).
    """

    output_dir: AbsolutePath
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    cache_dir: Annotated[AbsolutePath, Field(validate_default=True)] = Path("~/.cache/lyceum")


class LoraSettings(_Strict):
    """Low-rank adapters (peft).

    Attributes:
        rank, alpha, dropout, target_modules: as in peft.
        fused: compute plain layers as one function each (`fast_lora.py`), with peft's parameters and files.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    fused: bool = True


class ModelConfig(_Strict):
    """The student.

    Attributes:
        path: hub id or local folder of a model, or of an adapter (its base is then loaded too): with `lora` training goes on with
            the adapter, without it is merged first.
        dtype: of frozen weights, of the passes, and of the result; what is trained is float32 in memory in any case. float16 is
            refused: it would need a loss scaler.
        lora: adapters, or null to train every weight.
        compiled: compute decoder layers as compiled functions while training (`compiled.py`); `auto`: on a GPU.
        graphs: record the passes of each length that comes often and replay them with one launch each (`graphed.py`); needs a GPU,
            compiled layers and no dropout; `auto`: where these are given. Lengths are then padded to a few.
        threads: torch threads on CPU.
    """

    path: HomeText
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora: LoraSettings | None = LoraSettings()
    gradient_checkpointing: bool = False
    compiled: bool | Literal["auto"] = "auto"
    graphs: bool | Literal["auto"] = "auto"
    threads: Positive = 1


class SourceConfig(_Strict):
    """One file, folder or hub data set (docs/rows.md).

    Attributes:
        path: `~` is the home folder; `path#N` (or `sample`) takes N rows.
        format: a key of `data.formats.FORMATS`, or `auto` to recognise it by the fields.
        split, subset: of a folder or hub id.
        columns: name of a field in the rows -> the name it is read by; null leaves the field out on purpose.
    """

    path: HomeText
    format: str = "auto"
    sample: Positive | None = None
    split: str = "train"
    subset: str | None = None
    columns: dict[str, str | None] = Field(default_factory=dict)


def listed_sources(value: Any) -> list[Any]:
    """Sources as a config may write them: one stands for a list of one, a path for `{path: ...}`.

    Raises:
        ValueError: it is something else.
    """
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for item in listed:
        if not isinstance(item, str | dict | SourceConfig):
            raise ValueError(f"a source is a path or {{path: ...}}, or a list of these, not {type(item).__name__}")
    return [{"path": item} if isinstance(item, str) else item for item in listed]


Weight = Annotated[float, Field(ge=0, le=100)]


class TraceTasksConfig(_Strict):
    """What rows of format `trace` become; see `data.trace_rows.TraceTasks` (algorithms.md 7.3)."""

    tasks: Annotated[tuple[Literal["reason", "answer"], ...], Field(min_length=1)] = ("reason", "answer")
    reason_prefix: str = "[reason] "
    answer_prefix: str = "[answer] "
    open_tag: str = "<think>"
    close_tag: str = "</think>"
    reason_share: Weight = 1.0
    gamma: Weight = 1.0
    answer_weight: Weight = 1.0
    step_weight: Weight = 0.5
    evidence_weight: Weight = 0.25
    markup_weight: Weight = 0.1
    evidence_bonus: Weight = 0.2


class DataConfig(_Strict):
    """What is learned from.

    Attributes:
        train, eval: sources, in this order.
        template: `chat` (the tokenizer's), `plain`, `auto`, the name of one of a tokenizer's several templates, or a file (./x.jinja).
        template_kwargs: variables of the chat template, such as enable_thinking; a row's own stand before them.
        turns: which answers of a conversation are learned: all, in one sequence where the template allows it (`auto`) or each in its
            own (`each`), or the `last` alone.
        date: the day that a chat template prints; without it, that of the run's first start.
        max_tokens: longest sequence.
        overlong: what to do with a longer one; `drop` counts and reports them.
        bad_rows: what to do with a row that cannot be learned from; `skip` counts such rows and writes them to `bad_rows.jsonl` in the
            run folder.
        traces: what rows of format `trace` become.
    """

    train: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    eval: tuple[SourceConfig, ...] = ()
    template: Annotated[str, Field(min_length=1)] = "auto"
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    turns: Literal["auto", "each", "last"] = "auto"
    date: datetime.date | None = None
    system_prompt: str | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    overlong: Literal["refuse", "drop"] = "refuse"
    bad_rows: Literal["refuse", "skip"] = "refuse"
    traces: TraceTasksConfig = TraceTasksConfig()

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        return listed_sources(value)


class TeacherConfig(_Strict):
    """Whom to learn from: a server at `address`, or one started beside us from `embedded`.

    Attributes:
        address: HOST:PORT; several with commas are edges of one server, of which any will do.
        name: which teacher of the server; may be left out if it has one.
        embedded: a teacher-server config; needs the teacher extra.
        ca_file, cert_file, key_file: TLS.
        token_env: environment variable that holds our token.
        tenant: whose account this run is on; a token says it already.
        proxy: `auto` takes the HTTP proxy that grpc_proxy, https_proxy or http_proxy names (no_proxy excepted), `none` takes none, else
            http://HOST:PORT. Addresses of this machine never take one.
        wait_s: how long to wait for the server at the start.
        retry_s: how long a request is retried while the server is away.
        answer_s: how long a request that the server has taken may stay without any part of its answer before it is made again.
        allow_template_mismatch: learn although the teacher's chat template differs from ours.
    """

    address: str | None = None
    embedded: HomePath | None = None
    name: str = ""
    ca_file: HomePath | None = None
    cert_file: HomePath | None = None
    key_file: HomePath | None = None
    token_env: str = "LYCEUM_TOKEN"
    tenant: str = ""
    proxy: str = "auto"
    wait_s: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 5.0
    retry_s: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 300.0
    answer_s: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 600.0
    allow_template_mismatch: bool = False

    @field_validator("proxy")
    @classmethod
    def _a_proxy(cls, value: str) -> str:
        return value if value in (AUTO, NONE) else proxy_url(value)

    @model_validator(mode="after")
    def _one_place(self) -> TeacherConfig:
        if (self.address is None) == (self.embedded is None):
            raise ValueError("set exactly one of address and embedded")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("set both of cert_file and key_file, or neither: a certificate needs its key")
        if self.cert_file is not None and self.ca_file is None:
            raise ValueError("cert_file needs ca_file: without one the connection is plain text")
        return self


class LabelConfig(_Strict):
    """How labels travel (algorithms.md 2, 3).

    Attributes:
        transport: `hidden` is exact at every temperature; `top_k` sends k logits and the exact tail mass;
            `full` sends every logit, for small vocabularies; `auto` picks the exact one that fits card and link.
        k: kept entries of `top_k`.
        extra_ids: of `top_k`, the student's own likeliest ids a row that are kept too, for divergences that weigh by the
            student (reverse KL, JSD). Asked for when the student has seen the batch, so not ahead.
        compression: of `hidden`: int8 in blocks takes half the bytes (algorithms.md 3.4).
        check: of which rows of `hidden` labels the teacher sends lse and logp(label), for the student to recompute: a sample that finds
            every wrong sequence and one wrong row in eight, or all of them, which costs the teacher a product with its head. The other
            transports always send them of all rows.
    """

    transport: Literal["hidden", "top_k", "full", "auto"] = "hidden"
    k: Positive = 128
    extra_ids: Annotated[int, Field(ge=0)] = 0
    compression: Literal["none", "int8"] = "none"
    check: Literal["sampled", "all"] = "sampled"

    @model_validator(mode="after")
    def _fitting(self) -> LabelConfig:
        if self.extra_ids and self.transport != "top_k":
            raise ValueError(f"extra_ids belong to transport top_k, not {self.transport}")
        if self.compression != "none" and self.transport != "hidden":
            raise ValueError(
                f"compression belongs to transport hidden, not {self.transport} (auto decides it by itself)"
            )
        return self


class ScheduleConfig(_Strict):
    """A number that changes with the optimizer step (algorithms.md 11)."""

    kind: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    start: Annotated[float, Field(gt=0)]
    end: Annotated[float, Field(gt=0)]
    steps: Positive


class OutputLossConfig(_Strict):
    """Divergence of the output distributions (algorithms.md 1).

    Attributes:
        weight: of this term.
        beta: of `jsd`; 0 is forward KL, 1 reverse KL, exactly.
        alpha: of `skew_kl`, `skew_rkl` (0.1 if null) and `adaptive_kl` (0.5 if null).
        normalization: `paper`, or `unit` = D / (beta (1 - beta)), comparable across beta.
        temperature: of the loss, constant or a schedule. Not the temperature of sampling.
        tau_squared: multiply by temperature squared; null means: under a schedule.
        tempered_head: with `top_k`, the other objective of algorithms.md 2.4 that has a meaning at any temperature.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl"] = "forward_kl"
    beta: Fraction = 0.5
    alpha: Fraction | None = None
    normalization: Literal["paper", "unit"] = "paper"
    temperature: Annotated[float, Field(gt=0)] | ScheduleConfig = 1.0
    tau_squared: bool | None = None
    tempered_head: bool = False


class LossConfig(_Strict):
    """The training objective: distillation, hard labels, or both.

    Attributes:
        output: the distillation term, or null.
        sft_weight: of the cross-entropy with the data's own tokens. 0.5 beside a distillation term if left out, which did better than either
            term alone on rows whose answers are good (docs/results.md); set 0 where the answers are the teacher's own or poor.
        chunk_mb: bound on logits held at a time.
    """

    output: OutputLossConfig | None = OutputLossConfig()
    sft_weight: Annotated[float, Field(ge=0)] = 0.5
    chunk_mb: Positive = 1024

    @model_validator(mode="before")
    @classmethod
    def _distil_or_say(cls, value: Any) -> Any:
        """Without a distillation term the weight must be said: half a loss is nobody's default."""
        if isinstance(value, dict) and "output" in value and value["output"] is None:
            return {"sft_weight": 0.0, **value}
        return value

    @model_validator(mode="after")
    def _something(self) -> LossConfig:
        if self.output is None and self.sft_weight == 0:
            raise ValueError("nothing to learn: set output, or sft_weight above 0")
        return self


class OptimizationConfig(_Strict):
    """How long and how fast.

    Attributes:
        batch_size: sequences of one micro-batch.
        accumulation: micro-batches of one optimizer step.
        max_steps: optimizer steps; null means `epochs` over the data.
        warmup_steps, schedule, min_lr_share: of the learning rate.
        log_steps, eval_steps, save_steps: in optimizer steps; 0 is never (the end always counts).
        keep_checkpoints: how many to keep.
        report_to: trackers of transformers, such as tensorboard or wandb.
        nonfinite: what a step does whose loss or gradient is NaN or infinite: `stop` ends the run before the update, `skip`
            leaves that update out and counts it in the log.
        max_skipped: updates left out one after another, at most; then the run ends, whatever `nonfinite` says.
    """

    batch_size: Positive = 2
    accumulation: Positive = 8
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_lr_share: Fraction = 0.0
    bf16: bool = False
    log_steps: Positive = 10
    eval_steps: Annotated[int, Field(ge=0)] = 0
    eval_batch_size: Positive = 8
    save_steps: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: Positive = 2
    report_to: tuple[str, ...] = ()
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Positive = 10
    deterministic: bool = True

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class FeedConfig(_Strict):
    """How far labels are fetched ahead of the step that needs them.

    Attributes:
        max_mb: host memory of labels requested or waiting: as they travel, decoded, and in memory that a GPU copies from. One request is
            made however large it is. Labels of held-out rows are kept beside it up to as much again.
        max_batches: micro-batches requested or waiting, at most; how many it takes to hide the teacher's time is measured.
        window_mb: reply bytes the server may have under way.
    """

    max_mb: Positive = 768
    max_batches: Positive = 64
    window_mb: Positive = 64


class CacheConfig(_Strict):
    """What is kept on disk for all runs of this machine: labels in `run.cache_dir/labels`, teachers' output heads in `run.cache_dir/heads`.

    Attributes:
        labels: keep labels and use them; whatever a teacher was asked once, it need not be asked again.
        max_gb: budget of the labels; the longest unused go first.
        heads_gb: budget of the heads, likewise; 0 keeps none.
    """

    labels: bool = True
    max_gb: Annotated[float, Field(gt=0, le=2**40)] = 50.0
    heads_gb: Annotated[float, Field(ge=0, le=2**40)] = 20.0


class TrainConfig(_Strict):
    """Everything `student-trainer train` needs."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    teacher: TeacherConfig | None = None
    labels: LabelConfig = LabelConfig()
    loss: LossConfig = LossConfig()
    train: OptimizationConfig = OptimizationConfig()
    feed: FeedConfig = FeedConfig()
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _teacher_for_distillation(self) -> TrainConfig:
        if self.loss.output is not None and self.teacher is None:
            raise ValueError("loss.output needs a teacher: set the section teacher, or loss.output to null")
        if self.train.eval_steps and not self.data.eval:
            raise ValueError("train.eval_steps needs data.eval")
        if self.train.save_steps % self.train.log_steps:
            # A log entry is a mean since the last one: after a resumption between two entries it would be another mean.
            raise ValueError(
                f"train.save_steps={self.train.save_steps} must be a multiple of train.log_steps={self.train.log_steps}"
            )
        return self


def labels_folder(cache_dir: Path) -> Path:
    """Where labels are kept.

    Raises:
        ConfigError: `~`, and this user has no home.
    """
    return cache_folder(cache_dir) / "labels"


def cache_folder(cache_dir: Path) -> Path:
    """The folder that all runs of this machine share.

    Raises:
        ConfigError: `~`, and this user has no home.
    """
    try:
        return cache_dir.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{cache_dir}: there is no home folder (HOME is not set): set --cache-dir, in a config run.cache_dir"
        ) from error


def load_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a config file and applies `section.field=value` overrides.

    Raises:
        ConfigError: one line that names file and key.
    """
    return parse_config(read_tree(path.expanduser(), overrides), str(path))


def parse_config(tree: dict[str, Any], origin: str) -> TrainConfig:
    """A config from plain data.

    Raises:
        ConfigError: one line that names `origin` and every wrong key.
    """
    return parse_as(TrainConfig, tree, origin)


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
