"""The server's configuration: frozen, strict, parsed before torch or ray is imported.

In: a YAML file and `section.field=value` overrides; out: `ServerConfig`. An unknown key is an error
that names the key; nothing here builds anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, model_validator

from teacher_server.config.backends import BACKENDS, BackendConfig, VllmBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.config.files import Settings, parse_as, read_tree
from teacher_server.config.publish import PublishConfig
from teacher_wire.transport.channel import is_loopback

EDGE_NAME = "edge"  # of the endpoint among the application's deployments
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

if TYPE_CHECKING:
    AnyBackend = BackendConfig
else:  # the settings of whichever kind the section names
    AnyBackend = Annotated[Union[tuple(BACKENDS.values())], Field(discriminator="kind")]  # noqa: UP007


class _Strict(Settings):
    """A section; see `Settings`."""


class TlsConfig(_Strict):
    """Certificates of the edge, followed while it runs.

    Attributes:
        cert_file: PEM file of the server's certificate, followed by its chain.
        key_file: PEM file of the key, without a passphrase.
        client_ca_file: PEM file of an authority; with it every student must show a certificate signed by it.
        tenant: part of a student's certificate that names its tenant where there are no tokens: `dns` is its first DNS name, `uri` the last
            part of its first URI (SPIFFE), `common_name` the subject's.
    """

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    tenant: Literal["dns", "uri", "common_name"] = "dns"


class StoreConfig(_Strict):
    """Labels that are computed once for everybody.

    Attributes:
        memory_mb: MiB of the newest labels kept in the edge's memory; 0 for none.
        folder: folder where labels are kept on disk, shared by all edges that see it; null keeps none on disk.
        disk_gb: budget of the folder in GiB; the least recently used go first.
    """

    memory_mb: Annotated[int, Field(ge=0)] = 256
    folder: Path | None = None
    disk_gb: Annotated[float, Field(gt=0, le=1_000_000)] = 50.0


class EdgeLimitsConfig(_Strict):
    """What one edge holds for its peers at most (docs/operate/operating.md). Beyond it a request is refused as overloaded or waits.

    Attributes:
        calls: open Score streams and Generate, Artifact and Tokenize calls, of all tenants together.
        tenant_calls: open Score streams and Generate, Artifact and Tokenize calls of one tenant.
        heads: of `calls`, Artifact calls (output heads), each of up to gigabytes.
        tenant_heads: of `tenant_calls`, Artifact calls.
        tenant_requests: unanswered requests of one tenant.
        request_mb: longest Score request in MiB.
        requests_held_mb: MiB of unanswered requests, of all tenants together.
        tenant_requests_held_mb: MiB of unanswered requests of one tenant.
        replies_held_mb: MiB of labels being computed, or computed and not taken, of all tenants together.
        tenant_replies_held_mb: MiB of labels being computed, or computed and not taken, of one tenant.
        unproven_replies_held_mb: the same for a tenant that has taken nothing lately; what it took in the last seconds is added.
        kept_replies_mb: MiB of sent replies with which a broken stream can go on.
        stall_s: seconds after which a peer that takes nothing is dropped.
    """

    calls: Annotated[int, Field(ge=1)] = 4096
    tenant_calls: Annotated[int, Field(ge=1)] = 512
    heads: Annotated[int, Field(ge=1)] = 8
    tenant_heads: Annotated[int, Field(ge=1)] = 4
    tenant_requests: Annotated[int, Field(ge=1)] = 4096
    request_mb: Annotated[int, Field(ge=1, le=1024)] = 64
    requests_held_mb: Annotated[int, Field(ge=1)] = 256
    tenant_requests_held_mb: Annotated[int, Field(ge=1)] = 32
    replies_held_mb: Annotated[int, Field(ge=1)] = 2048
    tenant_replies_held_mb: Annotated[int, Field(ge=1)] = 1024
    unproven_replies_held_mb: Annotated[int, Field(ge=1)] = 64
    kept_replies_mb: Annotated[int, Field(ge=0)] = 64
    stall_s: Annotated[float, Field(gt=0)] = 120.0


class EdgeConfig(_Strict):
    """Where students connect.

    Attributes:
        host: address to listen on: loopback, unless TLS and credentials are set.
        port: port to listen on.
        tls: certificates; null is plain text.
        tokens_file: file of lines `TENANT TOKEN`; with it every call needs a token.
        drain_s: seconds for which requests under way may finish when the server goes down.
        window_mb: largest reply window, in MiB, that a student may open.
        reflection: serve gRPC reflection, for grpcurl.
        keepalive_s: seconds of silence after which a student is asked whether it is there.
        keepalive_timeout_s: seconds without an answer after which a student that was asked is dropped.
        count: number of edges, at most one per node; each listens on the same port of its node.
        store: labels kept by the edge.
        limits: most that is held for students.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 50051
    tls: TlsConfig | None = None
    tokens_file: Path | None = None
    drain_s: Annotated[float, Field(ge=0, le=600)] = 20.0
    window_mb: Annotated[int, Field(ge=1, le=4096)] = 256
    reflection: bool = False
    keepalive_s: Annotated[float, Field(ge=1, le=86_400)] = 30.0
    keepalive_timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 10.0
    count: Annotated[int, Field(ge=1)] = 1
    store: StoreConfig = StoreConfig()
    limits: EdgeLimitsConfig = EdgeLimitsConfig()

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @model_validator(mode="after")
    def _safe(self) -> EdgeConfig:
        if not is_loopback(self.address) and (
            self.tls is None or (self.tokens_file is None and self.tls.client_ca_file is None)
        ):
            raise ValueError(
                f"host {self.host} can be reached from other machines: set tls, and tokens_file or tls.client_ca_file"
            )
        if self.reflection and self.tokens_file is not None:
            raise ValueError("reflection answers without a token: switch it off, or remove tokens_file")
        return self


class RayConfig(_Strict):
    """The Ray cluster: our own on this machine, or a running one.

    Attributes:
        address: HOST:PORT of a running cluster's head, or `auto` for the one that runs on this machine. Without it, or with `local`, a
            cluster of our own is started, whatever RAY_ADDRESS says.
        listen: where the processes of our own cluster listen, Prometheus metrics included: `loopback` is reached from this machine only,
            `all` is every interface.
        metrics_port: port of Prometheus metrics of our own cluster; Ray chooses one if null.
        num_cpus: CPUs of our own cluster; Ray counts those of the machine if null.
        object_store_mb: MiB of shared memory of our own cluster.
    """

    address: Annotated[str, Field(pattern=r"^(auto|local|\S+:\d{1,5})$")] | None = None
    listen: Literal["loopback", "all"] = "loopback"
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    object_store_mb: Annotated[int, Field(ge=80)] = 512

    @property
    def own(self) -> bool:
        """Whether the cluster is started and ended by us."""
        return self.address in (None, "local")

    @model_validator(mode="after")
    def _no_client(self) -> RayConfig:
        if self.address is not None and "://" in self.address:
            raise ValueError(
                f"address {self.address}: give HOST:PORT of the cluster's head, not an address of Ray Client"
            )
        return self


class BatchConfig(_Strict):
    """How requests share forward passes.

    Attributes:
        max_tokens: token budget of one forward pass; a larger request has one of its own.
        max_queue_tokens: tokens that may wait at a replica; a tenant that would hold more than its share of them is refused as overloaded.
        interactive_tokens: token budget of a forward pass of interactive requests, and of one of bulk requests while interactive ones come;
            larger bulk requests are then cut between their sequences. At most `max_tokens`, an eighth of it if null.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 16_384
    max_queue_tokens: Annotated[int, Field(ge=1)] = 1_048_576
    interactive_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _interactive_batches_are_smaller(self) -> BatchConfig:
        if self.interactive_tokens is not None and self.interactive_tokens > self.max_tokens:
            raise ValueError(
                f"interactive_tokens {self.interactive_tokens} must be at most max_tokens {self.max_tokens}"
            )
        return self

    @property
    def small_tokens(self) -> int:
        """`interactive_tokens`, or an eighth of `max_tokens` where it is not given."""
        return self.interactive_tokens or max(1, self.max_tokens // 8)


class LimitsConfig(_Strict):
    """What one request may ask for. `max_sequence_tokens` defaults to the model's own limit.

    Attributes:
        max_sequence_tokens: longest sequence of a request; the model's own limit if null.
        max_request_tokens: tokens of one request.
        max_request_sequences: sequences of one request.
        max_k: largest k of `top_k`.
        max_reply_mb: MiB of labels of one request.
    """

    max_sequence_tokens: Annotated[int, Field(ge=2)] | None = None
    max_request_tokens: Annotated[int, Field(ge=2)] = 65_536
    max_request_sequences: Annotated[int, Field(ge=1)] = 1_024
    max_k: Annotated[int, Field(ge=1)] = 4_096
    max_reply_mb: Annotated[int, Field(ge=1)] = 64


class GenerationConfig(_Strict):
    """How much may be written at a time, and what one call may ask for.

    Attributes:
        max_running: sequences written at once.
        max_cache_tokens: slots of KV cache of all running sequences, each counted from its start at prompt and max_new_tokens; where rows
            are padded (transformers), at the longest of those with which it shares a cache.
        max_queue_tokens: the same for all sequences that wait; beyond it a call is refused as overloaded.
        max_new_tokens: longest sample, in tokens.
        max_samples: samples of one prompt.
        max_call_tokens: prompt and new tokens of all samples of one call.
        max_schema_bytes: bytes of a JSON schema.
    """

    max_running: Annotated[int, Field(ge=1)] = 64
    max_cache_tokens: Annotated[int, Field(ge=2)] = 131_072
    max_queue_tokens: Annotated[int, Field(ge=2)] = 8_388_608
    max_new_tokens: Annotated[int, Field(ge=1)] = 4_096
    max_samples: Annotated[int, Field(ge=1)] = 64
    max_call_tokens: Annotated[int, Field(ge=2)] = 1_048_576
    max_schema_bytes: Annotated[int, Field(ge=2)] = 65_536


class AutoscalingConfig(_Strict):
    """Ray Serve's autoscaling of one teacher, on the tokens that wait in a replica's queue.

    Attributes:
        min_replicas: fewest replicas.
        max_replicas: most replicas.
        target_queued_tokens: queued tokens per replica above which one is added.
        upscale_delay_s: seconds for which more replicas must be wanted before one is added.
        downscale_delay_s: seconds for which fewer replicas must be wanted before one is removed.
    """

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_queued_tokens: Annotated[int, Field(ge=1)] = 65_536
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class TeacherConfig(_Strict):
    """One teacher: its own Serve deployment.

    Attributes:
        name: name by which students ask for it.
        backend: the model behind the teacher; `kind` chooses the settings.
        deterministic: whether every sequence is computed by itself, so that its labels always have the same bits, whatever else is asked at
            the time; slower, since forward passes are not shared.
        features: basis of the states of layers; without it states do not travel as principal components, and a student that asks for them
            is refused.
        publish: who may replace its weights while it serves; null for nobody.
        num_cpus: CPUs that Ray sets aside for a replica.
        num_gpus: GPUs that Ray sets aside for a replica.
        hang_s: seconds after which a call of the backend (a forward pass, the wait for its answers, one step of writing) counts as hung:
            the replica is unhealthy and replaced. Must be well above the longest batch; null for never.
        max_ongoing_requests: requests that a replica holds; beyond it they wait at the edge, first come first served for all tenants.
    """

    name: Name
    backend: AnyBackend
    deterministic: bool = False
    batch: BatchConfig = BatchConfig()
    limits: LimitsConfig = LimitsConfig()
    generation: GenerationConfig = GenerationConfig()
    features: FeaturesConfig | None = None
    publish: PublishConfig | None = None
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    hang_s: Annotated[float, Field(gt=0)] | None = 1800.0
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 100_000

    @model_validator(mode="after")
    def _features_are_given(self) -> TeacherConfig:
        if isinstance(self.backend, VllmBackend) and self.features is not None:
            raise ValueError(
                f"features of teacher {self.name}: backend vllm gives no states of layers: remove `features`"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_replaced(self) -> TeacherConfig:
        if self.publish is not None and not hasattr(self.backend, "model"):
            raise ValueError(f"publish of teacher {self.name}: backend {self.backend.kind} has no weights to replace")
        return self

    @model_validator(mode="after")
    def _gpus_are_used(self) -> TeacherConfig:
        if isinstance(self.backend, VllmBackend) and self.num_gpus:
            spread = self.backend.tensor_parallel_size
            if (spread > 1 and self.num_gpus != spread) or self.num_gpus > spread:
                raise ValueError(
                    f"num_gpus {self.num_gpus:g} of teacher {self.name}: backend.tensor_parallel_size {spread} takes exactly {spread}"
                    + (", or a part of one" if spread == 1 else "")
                )
        return self


class TenantConfig(_Strict):
    """What one tenant may take. Its name is the first word of its line in `edge.tokens_file`.

    Attributes:
        weight: share under contention, relative to the other tenants'.
        tokens_per_s: tokens per second computed for it; stored labels cost nothing. null for no quota.
        inflight_tokens: tokens waiting or being computed for it; null for no quota.
        bytes_per_s: bytes per second of labels sent to it; null for no quota.
        operator: whether it sees the other tenants in `teacher-server status`.
    """

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    tokens_per_s: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    inflight_tokens: Annotated[int, Field(ge=1)] | None = None
    bytes_per_s: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    operator: bool = False


DEFAULT_TENANT = "default"  # of whoever has no entry of its own, each on its own account
Tenants = Annotated[dict[Name, TenantConfig], Field(default_factory=dict)]


class ServerConfig(_Strict):
    """Everything `teacher-server up` needs. `tenants` and `teachers` may change while it runs.

    Attributes:
        edge: where students connect. Changes take a restart.
        ray: the Ray cluster. Changes take a restart.
        teachers: the teachers; followed while the server runs.
        tenants: weights and quotas by tenant; `default` holds for every tenant without an entry, each on its own account. Followed while
            the server runs.
    """

    edge: EdgeConfig = EdgeConfig()
    ray: RayConfig = RayConfig()
    teachers: Annotated[tuple[TeacherConfig, ...], Field(min_length=1)]
    tenants: Tenants

    @model_validator(mode="after")
    def _distinct(self) -> ServerConfig:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers need distinct names, got {', '.join(names)}")
        if EDGE_NAME in names:
            raise ValueError(f"the name {EDGE_NAME!r} is the endpoint's own: call the teacher otherwise")
        return self


def load_config(path: Path, overrides: list[str] | None = None) -> ServerConfig:
    """Reads a config file and applies `section.field=value` overrides.

    Raises:
        ServerConfigError: one line that names file and key.
    """
    return parse_as(ServerConfig, read_tree(path, overrides), str(path))
