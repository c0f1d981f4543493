"""The sections about teachers: where one is (`teacher`), how its labels travel (`labels`), how far ahead they are fetched (`feed`) and what is
kept of them on disk (`cache`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from student_trainer.config.fields import Fraction, HomePath, Positive, checked_tags
from student_trainer.config.files import Settings
from teacher_wire.transport.proxy import AUTO, NONE, proxy_url

Combine = Literal["loss_sum", "prob_mix", "route", "confidence"]
WhenMissing = Literal["reweight", "wait", "fail"]


class ContextConfig(Settings):
    """What of each row the teacher alone is told: a hint, the reference answer, a document, another system prompt (docs/train/objectives.md).

    Attributes:
        field: of the rows, whose text it is; a row without it is a bad row.
        template: what becomes of the message: `{message}` stands for the message as the student reads it, `{context}` for the field's text.
        role: whose message: the last one of the `user` before the answers, or the `system` message, which is made if there is none.
    """

    field: Annotated[str, Field(min_length=1)]
    template: str = "{message}\n\n{context}"
    role: Literal["user", "system"] = "user"

    @field_validator("template")
    @classmethod
    def _tells(cls, value: str) -> str:
        if "{context}" not in value:
            raise ValueError(
                "must have the place {context}, where the field's text goes; {message} stands for the message itself"
            )
        return value


class CrossTokenizerConfig(Settings):
    """How a teacher with another tokenizer than the student's is learned from (docs/train/many_teachers.md); unused with the same one.

    Attributes:
        alm_weight: of a token in groups of tokens that are not one to one, whose likelihoods as a whole are compared, against a token that is.
        alm_temperature: of that comparison.
        min_coverage: a sample of which a smaller share of tokens is one to one is not labelled by this teacher.
    """

    alm_weight: Annotated[float, Field(ge=0)] = 0.5
    alm_temperature: Annotated[float, Field(gt=0)] = 100.0
    min_coverage: Fraction = 0.5


class TeacherConfig(Settings):
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
        offline: never connect: who the teacher is, its output head and its labels are those that `student-trainer label`, or an earlier run, has
            left in `run.cache_dir` (docs/recipes/one_card.md). `address` or `embedded` then only says which teacher is meant, and may be left out.
        fingerprint: the teacher's must begin so; "" for any. Offline it chooses among the teachers on disk.
        context: what of each row the teacher alone is told; null for nothing.
        cross_tokenizer: how it is learned from if its tokenizer is another one.
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
    offline: bool = False
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]*$")] = ""
    context: ContextConfig | None = None
    cross_tokenizer: CrossTokenizerConfig = CrossTokenizerConfig()

    @property
    def called(self) -> str:
        """Its name in the run; empty where the server's only teacher is meant and nobody else is asked."""
        return self.name

    @property
    def place(self) -> str:
        """Where it is asked, in words; empty where an offline teacher does not say it."""
        return self.address or (f"embedded {self.embedded}" if self.embedded is not None else "")

    @field_validator("proxy")
    @classmethod
    def _a_proxy(cls, value: str) -> str:
        return value if value in (AUTO, NONE) else proxy_url(value)

    @model_validator(mode="after")
    def _one_place(self) -> TeacherConfig:
        if (self.address is None) == (self.embedded is None) and not (self.offline and self.address is None):
            raise ValueError("set exactly one of address and embedded")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("set both of cert_file and key_file, or neither: a certificate needs its key")
        if self.cert_file is not None and self.ca_file is None:
            raise ValueError("cert_file needs ca_file: without one the connection is plain text")
        return self


class LabelConfig(Settings):
    """How labels travel (algorithms.md 2, 3).

    Attributes:
        transport: `hidden` is exact at every temperature; `top_k` sends k logits and the exact tail mass;
            `full` sends every logit, for small vocabularies; `given` sends the log-probability of each token alone, for `pg_rkl`; `auto` picks the exact one that fits card and link.
        k: kept entries of `top_k`.
        extra_ids: of `top_k`, the student's own likeliest ids per row that are kept too, for divergences that weigh by the
            student (reverse KL, JSD). Asked for when the student has seen the batch, so not ahead.
        compression: of `hidden`: int8 in blocks takes half the bytes (algorithms.md 3.4).
        check: of which rows of `hidden` labels the teacher sends lse and logp(label), for the student to recompute: a sample that finds
            every wrong sequence and one wrong row in eight, or all of them, which costs the teacher a product with its head. The other
            transports always send them of all rows.
    """

    transport: Literal["hidden", "top_k", "full", "given", "auto"] = "hidden"
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


class OneOfTeachersConfig(TeacherConfig):
    """One of several teachers of a run.

    Attributes:
        alias: what the run calls it, in its log, its errors and `loss.*.teacher`; its `name` if left out. Every teacher of a run has another.
        weight: its share of the loss, beside the weights of the others that are asked about the same sample.
        labels: how its labels travel; a transport's name stands for a section. The section `labels` of the run if left out.
        tags: asked only about rows that have one of them (`data.tag_field`, `data.train[].tags`); empty: about rows of which no other
            teacher has a tag under `combine: route`, else about every row.
        when_missing: of this teacher; the run's if null.
        cache: keep its labels on disk and use them; the run's `cache.labels` if null.
    """

    alias: str = ""
    weight: Annotated[float, Field(gt=0)] = 1.0
    labels: LabelConfig | None = None
    tags: tuple[str, ...] = ()
    when_missing: WhenMissing | None = None
    cache: bool | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"transport": value} if isinstance(value, str) else value

    @field_validator("tags")
    @classmethod
    def _texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return checked_tags(value)

    @property
    def called(self) -> str:
        """Its name in the run."""
        return self.alias or self.name


class FeedConfig(Settings):
    """How far labels are fetched ahead of the step that needs them.

    Attributes:
        max_mb: host memory of labels requested or waiting: in wire bytes, decoded, and in pinned copies. One request is
            made however large it is. Labels of held-out rows are kept beside it up to as much again.
        max_batches: micro-batches requested or waiting, at most; how many it takes to hide the teacher's time is measured.
        window_mb: reply bytes the server may have under way.
    """

    max_mb: Positive = 768
    max_batches: Positive = 64
    window_mb: Positive = 64


class CacheConfig(Settings):
    """What is kept on disk for all runs of this machine: labels in `run.cache_dir/labels`, teachers' output heads in `run.cache_dir/heads`.

    Attributes:
        labels: keep labels and use them; whatever a teacher was asked once, it need not be asked again.
        max_gb: budget of the labels; the longest unused go first.
        heads_gb: budget of the heads, likewise; 0 keeps none.
    """

    labels: bool = True
    max_gb: Annotated[float, Field(gt=0, le=2**40)] = 50.0
    heads_gb: Annotated[float, Field(ge=0, le=2**40)] = 20.0
