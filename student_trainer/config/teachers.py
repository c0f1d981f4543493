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
        field: field of the rows whose text the teacher is told; a row without it is a bad row.
        template: text that replaces the message: `{message}` stands for the message as the student reads it, `{context}` for the field's
            text.
        role: which message is replaced: the last one of the `user` before the answers, or the `system` message, which is added if there is
            none.
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
        alm_weight: weight of a token in groups that are not one to one, whose likelihoods are compared as a whole, relative to a token that
            is one to one.
        alm_temperature: temperature of that comparison.
        min_coverage: smallest share of one-to-one tokens with which this teacher labels a sample.
    """

    alm_weight: Annotated[float, Field(ge=0)] = 0.5
    alm_temperature: Annotated[float, Field(gt=0)] = 100.0
    min_coverage: Fraction = 0.5


class TeacherConfig(Settings):
    """Whom to learn from: a server at `address`, or one started beside us from `embedded`.

    Attributes:
        address: HOST:PORT of the server. Several addresses with commas are edges of one server, any of which will do.
        embedded: path of a teacher-server config: the server is started and stopped with the run. Needs the teacher extra.
        name: name of the teacher on the server; may be left out if the server has only one.
        ca_file: PEM file of the authority that signed the server's certificate; with it the connection uses TLS.
        cert_file: PEM file of the student's own certificate, for servers that ask for one.
        key_file: PEM file of the key of `cert_file`.
        token_env: environment variable that holds the token.
        tenant: tenant on whose account the run is; with a token the token decides it.
        proxy: `auto` takes the HTTP proxy that grpc_proxy, https_proxy or http_proxy name (no_proxy excepted), `none` takes none, anything
            else is http://HOST:PORT. Addresses of this machine are never reached through a proxy.
        wait_s: seconds to wait for the server at the start.
        retry_s: seconds for which a request is retried while the server is away.
        answer_s: seconds without any part of an answer after which a request that the server has taken is sent again.
        allow_template_mismatch: train even though the chat templates of teacher and student differ.
        offline: never connect: the teacher's identity, output head and labels are those that `student-trainer label` or an earlier run left
            in `run.cache_dir` (docs/recipes/one_card.md). `address` or `embedded` then only says which teacher is meant, and may be left
            out.
        fingerprint: first digits that the teacher's fingerprint must have; empty accepts any. Offline it chooses among the teachers on
            disk.
        context: text of each row that the teacher alone is told; null for none.
        cross_tokenizer: how a teacher with another tokenizer is learned from; unused with the same tokenizer.
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


_USUAL_K = 128


class LabelConfig(Settings):
    """How labels travel (docs/concepts/method.md 2, 3).

    Attributes:
        transport: what travels: `hidden` is exact at every temperature; `top_k` sends k logits and the exact tail mass; `full` sends every
            logit, for small vocabularies; `given` sends the log-probability of each token alone, for `pg_rkl`; `auto` picks the exact
            transport that fits card and link.
        k: entries kept by `top_k`, also where `auto` comes to it, or where held-out rows are measured by it.
        extra_ids: number of the student's own likeliest ids per row that `top_k` keeps too, for divergences that weigh by the student
            (reverse KL, JSD). They are known only once the student has seen the batch, so labels are not fetched ahead.
        compression: compression of `hidden`: int8 in blocks takes half the bytes (docs/concepts/method.md 3.4).
        check: rows of `hidden` labels for which the teacher sends log-sum-exp and log-probability, for the student to recompute: a sample
            that finds every wrong sequence and one wrong row in eight, or all rows, which costs the teacher a product with its head. The
            other transports always send them for all rows.
    """

    transport: Literal["hidden", "top_k", "full", "given", "auto"] = "hidden"
    k: Positive = _USUAL_K
    extra_ids: Annotated[int, Field(ge=0)] = 0
    compression: Literal["none", "int8"] = "none"
    check: Literal["sampled", "all"] = "sampled"

    @model_validator(mode="after")
    def _fitting(self) -> LabelConfig:
        if self.k != _USUAL_K and self.transport in ("hidden", "full"):
            raise ValueError(
                f"k={self.k} belongs to transport top_k, not {self.transport}, which leaves no id out: leave k out, or at {_USUAL_K}"
            )
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
        alias: name of this teacher in the log, in errors and in `loss.*.teacher`; its `name` if left out. No two teachers of a run share
            one.
        weight: share of the loss relative to the other teachers that are asked about the same sample.
        labels: how this teacher's labels travel; the name of a transport stands for a section. The section `labels` of the run if left out.
        tags: the teacher is asked only about rows that have one of these tags (`data.tag_field`, `data.train[].tags`). Empty: about rows of
            which no other teacher has a tag under `combine: route`, else about every row.
        when_missing: what is done while this teacher does not answer; the run's setting if null.
        cache: whether this teacher's labels are kept on disk and used; the run's `cache.labels` if null.
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
        max_mb: host memory, in MiB, of labels requested or waiting: in wire bytes, decoded, and in pinned copies. One request is always
            made, however large it is. Labels of held-out rows may take the same amount in addition.
        max_batches: micro-batches requested or waiting, at most. How many it takes to hide the teacher's time is measured.
        window_mb: MiB of replies that the server may have under way.
    """

    max_mb: Positive = 768
    max_batches: Positive = 64
    window_mb: Positive = 64


class CacheConfig(Settings):
    """What is kept on disk for all runs of this machine: labels in `run.cache_dir/labels`, teachers' output heads in `run.cache_dir/heads`.

    Attributes:
        labels: whether labels are kept and used, so that a teacher is asked about a sequence only once.
        max_gb: budget of the labels in GiB; the least recently used go first.
        heads_gb: budget of the output heads in GiB, likewise; 0 keeps none.
    """

    labels: bool = True
    max_gb: Annotated[float, Field(gt=0, le=2**40)] = 50.0
    heads_gb: Annotated[float, Field(ge=0, le=2**40)] = 20.0
