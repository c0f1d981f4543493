from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    UINT16: _ClassVar[DType]
    UINT24: _ClassVar[DType]
    INT32: _ClassVar[DType]
    INT8: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]

class Check(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALL: _ClassVar[Check]
    SAMPLED: _ClassVar[Check]

class Cache(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_SHARED: _ClassVar[Cache]
    CACHE_NONE: _ClassVar[Cache]

class Latency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LATENCY_BULK: _ClassVar[Latency]
    LATENCY_INTERACTIVE: _ClassVar[Latency]

class Axis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AXIS_UNSPECIFIED: _ClassVar[Axis]
    ROW: _ClassVar[Axis]
    CHECKED: _ClassVar[Axis]
    SEQUENCE: _ClassVar[Axis]
    PAIR: _ClassVar[Axis]
    BLOCK: _ClassVar[Axis]
    TOKEN: _ClassVar[Axis]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_UNSPECIFIED: _ClassVar[FinishReason]
    STOP: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]

class PublishStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUBLISH_UNSPECIFIED: _ClassVar[PublishStage]
    RECEIVING: _ClassVar[PublishStage]
    CHECKING: _ClassVar[PublishStage]
    DEPLOYING: _ClassVar[PublishStage]
    LIVE: _ClassVar[PublishStage]
DTYPE_UNSPECIFIED: DType
UINT8: DType
UINT16: DType
UINT24: DType
INT32: DType
INT8: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT32: DType
ALL: Check
SAMPLED: Check
CACHE_SHARED: Cache
CACHE_NONE: Cache
LATENCY_BULK: Latency
LATENCY_INTERACTIVE: Latency
AXIS_UNSPECIFIED: Axis
ROW: Axis
CHECKED: Axis
SEQUENCE: Axis
PAIR: Axis
BLOCK: Axis
TOKEN: Axis
FINISH_UNSPECIFIED: FinishReason
STOP: FinishReason
LENGTH: FinishReason
PUBLISH_UNSPECIFIED: PublishStage
RECEIVING: PublishStage
CHECKING: PublishStage
DEPLOYING: PublishStage
LIVE: PublishStage

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol", "server_version", "teachers")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server_version: str
    teachers: _containers.RepeatedCompositeFieldContainer[TeacherInfo]
    def __init__(self, protocol: _Optional[int] = ..., server_version: _Optional[str] = ..., teachers: _Optional[_Iterable[_Union[TeacherInfo, _Mapping]]] = ...) -> None: ...

class TeacherInfo(_message.Message):
    __slots__ = ("name", "model", "fingerprint", "architecture", "dtype", "vocab_rows", "tokenizer_size", "tokenizer_sha256", "chat_template_sha256", "hidden_size", "layers", "artifacts", "transports", "deterministic", "limits", "generates", "base_tokenizer_sha256", "added_tokens", "kv_width", "basis_rank", "basis_layers", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    GENERATES_FIELD_NUMBER: _ClassVar[int]
    BASE_TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    ADDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_WIDTH_FIELD_NUMBER: _ClassVar[int]
    BASIS_RANK_FIELD_NUMBER: _ClassVar[int]
    BASIS_LAYERS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    fingerprint: str
    architecture: str
    dtype: str
    vocab_rows: int
    tokenizer_size: int
    tokenizer_sha256: str
    chat_template_sha256: str
    hidden_size: int
    layers: int
    artifacts: _containers.RepeatedCompositeFieldContainer[ArtifactInfo]
    transports: _containers.RepeatedScalarFieldContainer[str]
    deterministic: bool
    limits: Limits
    generates: _containers.RepeatedScalarFieldContainer[str]
    base_tokenizer_sha256: str
    added_tokens: str
    kv_width: int
    basis_rank: int
    basis_layers: _containers.RepeatedScalarFieldContainer[int]
    revision: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_rows: _Optional[int] = ..., tokenizer_size: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ..., chat_template_sha256: _Optional[str] = ..., hidden_size: _Optional[int] = ..., layers: _Optional[int] = ..., artifacts: _Optional[_Iterable[_Union[ArtifactInfo, _Mapping]]] = ..., transports: _Optional[_Iterable[str]] = ..., deterministic: bool = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., generates: _Optional[_Iterable[str]] = ..., base_tokenizer_sha256: _Optional[str] = ..., added_tokens: _Optional[str] = ..., kv_width: _Optional[int] = ..., basis_rank: _Optional[int] = ..., basis_layers: _Optional[_Iterable[int]] = ..., revision: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sequence_tokens", "max_request_tokens", "max_request_sequences", "max_k", "max_reply_bytes", "max_new_tokens", "max_samples", "max_generate_tokens", "max_schema_bytes", "max_tokenize_bytes", "max_tokenize_rows")
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SCHEMA_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENIZE_ROWS_FIELD_NUMBER: _ClassVar[int]
    max_sequence_tokens: int
    max_request_tokens: int
    max_request_sequences: int
    max_k: int
    max_reply_bytes: int
    max_new_tokens: int
    max_samples: int
    max_generate_tokens: int
    max_schema_bytes: int
    max_tokenize_bytes: int
    max_tokenize_rows: int
    def __init__(self, max_sequence_tokens: _Optional[int] = ..., max_request_tokens: _Optional[int] = ..., max_request_sequences: _Optional[int] = ..., max_k: _Optional[int] = ..., max_reply_bytes: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_samples: _Optional[int] = ..., max_generate_tokens: _Optional[int] = ..., max_schema_bytes: _Optional[int] = ..., max_tokenize_bytes: _Optional[int] = ..., max_tokenize_rows: _Optional[int] = ...) -> None: ...

class Signal(_message.Message):
    __slots__ = ("kind", "layers", "reduction", "numbers", "names")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class NamesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    reduction: str
    numbers: _containers.ScalarMap[str, float]
    names: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., reduction: _Optional[str] = ..., numbers: _Optional[_Mapping[str, float]] = ..., names: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SignalSpec(_message.Message):
    __slots__ = ("vocab_rows", "signals", "check")
    VOCAB_ROWS_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    vocab_rows: int
    signals: _containers.RepeatedCompositeFieldContainer[Signal]
    check: Check
    def __init__(self, vocab_rows: _Optional[int] = ..., signals: _Optional[_Iterable[_Union[Signal, _Mapping]]] = ..., check: _Optional[_Union[Check, str]] = ...) -> None: ...

class ScoreUp(_message.Message):
    __slots__ = ("open", "request", "credit", "ack", "cancel", "part")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    open: Open
    request: ScoreRequest
    credit: Credit
    ack: Ack
    cancel: Cancel
    part: RequestPart
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., request: _Optional[_Union[ScoreRequest, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., part: _Optional[_Union[RequestPart, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "window_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    window_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., window_bytes: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "teacher", "fingerprint", "spec", "token_ids", "cu_lengths", "wanted", "timeout_ms", "resume", "extra_ids", "cache", "latency")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CU_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    EXTRA_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    teacher: str
    fingerprint: str
    spec: SignalSpec
    token_ids: Tensor
    cu_lengths: Tensor
    wanted: Tensor
    timeout_ms: int
    resume: Resume
    extra_ids: Tensor
    cache: Cache
    latency: Latency
    def __init__(self, request_id: _Optional[str] = ..., teacher: _Optional[str] = ..., fingerprint: _Optional[str] = ..., spec: _Optional[_Union[SignalSpec, _Mapping]] = ..., token_ids: _Optional[_Union[Tensor, _Mapping]] = ..., cu_lengths: _Optional[_Union[Tensor, _Mapping]] = ..., wanted: _Optional[_Union[Tensor, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., extra_ids: _Optional[_Union[Tensor, _Mapping]] = ..., cache: _Optional[_Union[Cache, str]] = ..., latency: _Optional[_Union[Latency, str]] = ...) -> None: ...

class RequestPart(_message.Message):
    __slots__ = ("request_id", "total_bytes", "offset", "data")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    total_bytes: int
    offset: int
    data: bytes
    def __init__(self, request_id: _Optional[str] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("reply_id", "next_chunk")
    REPLY_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    reply_id: int
    next_chunk: int
    def __init__(self, reply_id: _Optional[int] = ..., next_chunk: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ScoreDown(_message.Message):
    __slots__ = ("chunk", "done", "failed")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    chunk: ScoreChunk
    done: ScoreDone
    failed: ScoreFailed
    def __init__(self, chunk: _Optional[_Union[ScoreChunk, _Mapping]] = ..., done: _Optional[_Union[ScoreDone, _Mapping]] = ..., failed: _Optional[_Union[ScoreFailed, _Mapping]] = ...) -> None: ...

class ScoreChunk(_message.Message):
    __slots__ = ("request_id", "reply_id", "index", "first_row", "rows", "tensors")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reply_id: int
    index: int
    first_row: int
    rows: int
    tensors: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    def __init__(self, request_id: _Optional[str] = ..., reply_id: _Optional[int] = ..., index: _Optional[int] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ...) -> None: ...

class NamedTensor(_message.Message):
    __slots__ = ("name", "axis", "tensor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AXIS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    axis: Axis
    tensor: Tensor
    def __init__(self, name: _Optional[str] = ..., axis: _Optional[_Union[Axis, str]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ScoreDone(_message.Message):
    __slots__ = ("request_id", "reply_id", "chunks", "rows", "fingerprint", "timing")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reply_id: int
    chunks: int
    rows: int
    fingerprint: str
    timing: Timing
    def __init__(self, request_id: _Optional[str] = ..., reply_id: _Optional[int] = ..., chunks: _Optional[int] = ..., rows: _Optional[int] = ..., fingerprint: _Optional[str] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "forward_us", "reduce_us", "batch_tokens")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    FORWARD_US_FIELD_NUMBER: _ClassVar[int]
    REDUCE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    forward_us: int
    reduce_us: int
    batch_tokens: int
    def __init__(self, queue_us: _Optional[int] = ..., forward_us: _Optional[int] = ..., reduce_us: _Optional[int] = ..., batch_tokens: _Optional[int] = ...) -> None: ...

class ScoreFailed(_message.Message):
    __slots__ = ("request_id", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    error: ErrorDetail
    def __init__(self, request_id: _Optional[str] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("kind", "message", "field", "value", "limit", "retry_after_s")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    field: str
    value: str
    limit: str
    retry_after_s: float
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., value: _Optional[str] = ..., limit: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class SamplingSpec(_message.Message):
    __slots__ = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "stop_ids", "ignore_eos", "json_schema")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    json_schema: bytes
    def __init__(self, samples: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_new_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., json_schema: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("teacher", "fingerprint", "token_ids", "cu_lengths", "sampling", "have", "timeout_ms")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CU_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    fingerprint: str
    token_ids: Tensor
    cu_lengths: Tensor
    sampling: SamplingSpec
    have: Tensor
    timeout_ms: int
    def __init__(self, teacher: _Optional[str] = ..., fingerprint: _Optional[str] = ..., token_ids: _Optional[_Union[Tensor, _Mapping]] = ..., cu_lengths: _Optional[_Union[Tensor, _Mapping]] = ..., sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., have: _Optional[_Union[Tensor, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class GenerateDown(_message.Message):
    __slots__ = ("sample", "done")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    sample: Sample
    done: GenerateDone
    def __init__(self, sample: _Optional[_Union[Sample, _Mapping]] = ..., done: _Optional[_Union[GenerateDone, _Mapping]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("prompt", "index", "token_ids", "token_logp", "finish")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGP_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    prompt: int
    index: int
    token_ids: Tensor
    token_logp: Tensor
    finish: FinishReason
    def __init__(self, prompt: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Union[Tensor, _Mapping]] = ..., token_logp: _Optional[_Union[Tensor, _Mapping]] = ..., finish: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class GenerateDone(_message.Message):
    __slots__ = ("samples", "fingerprint")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    samples: int
    fingerprint: str
    def __init__(self, samples: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ArtifactInfo(_message.Message):
    __slots__ = ("kind", "sha256", "bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    sha256: str
    bytes: int
    def __init__(self, kind: _Optional[str] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class ArtifactRequest(_message.Message):
    __slots__ = ("teacher", "fingerprint", "kind", "sha256", "offset", "timeout_ms")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    fingerprint: str
    kind: str
    sha256: str
    offset: int
    timeout_ms: int
    def __init__(self, teacher: _Optional[str] = ..., fingerprint: _Optional[str] = ..., kind: _Optional[str] = ..., sha256: _Optional[str] = ..., offset: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class ArtifactChunk(_message.Message):
    __slots__ = ("header", "offset", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: ArtifactHeader
    offset: int
    data: bytes
    def __init__(self, header: _Optional[_Union[ArtifactHeader, _Mapping]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ArtifactHeader(_message.Message):
    __slots__ = ("kind", "sha256", "tensors", "numbers")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    sha256: str
    tensors: _containers.RepeatedCompositeFieldContainer[ArtifactTensor]
    numbers: _containers.ScalarMap[str, float]
    def __init__(self, kind: _Optional[str] = ..., sha256: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[ArtifactTensor, _Mapping]]] = ..., numbers: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ArtifactTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("teacher", "fingerprint", "rows", "timeout_ms")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    fingerprint: str
    rows: _containers.RepeatedCompositeFieldContainer[TokenizeRow]
    timeout_ms: int
    def __init__(self, teacher: _Optional[str] = ..., fingerprint: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[TokenizeRow, _Mapping]]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class TokenizeRow(_message.Message):
    __slots__ = ("conversation", "text", "marks")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    conversation: bytes
    text: bytes
    marks: _containers.RepeatedCompositeFieldContainer[TokenizeMark]
    def __init__(self, conversation: _Optional[bytes] = ..., text: _Optional[bytes] = ..., marks: _Optional[_Iterable[_Union[TokenizeMark, _Mapping]]] = ...) -> None: ...

class TokenizeMark(_message.Message):
    __slots__ = ("at", "role")
    AT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    at: int
    role: int
    def __init__(self, at: _Optional[int] = ..., role: _Optional[int] = ...) -> None: ...

class TokenizeReply(_message.Message):
    __slots__ = ("fingerprint", "rows")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    rows: _containers.RepeatedCompositeFieldContainer[TokenizedRow]
    def __init__(self, fingerprint: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[TokenizedRow, _Mapping]]] = ...) -> None: ...

class TokenizedRow(_message.Message):
    __slots__ = ("token_ids", "prompt_tokens", "byte_ends", "ended", "digest", "refused")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTE_ENDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    token_ids: Tensor
    prompt_tokens: int
    byte_ends: Tensor
    ended: bool
    digest: str
    refused: str
    def __init__(self, token_ids: _Optional[_Union[Tensor, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., byte_ends: _Optional[_Union[Tensor, _Mapping]] = ..., ended: bool = ..., digest: _Optional[str] = ..., refused: _Optional[str] = ...) -> None: ...

class PublishUp(_message.Message):
    __slots__ = ("open", "data")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    open: PublishOpen
    data: PublishData
    def __init__(self, open: _Optional[_Union[PublishOpen, _Mapping]] = ..., data: _Optional[_Union[PublishData, _Mapping]] = ...) -> None: ...

class PublishOpen(_message.Message):
    __slots__ = ("teacher", "config_json", "tokenizer_sha256", "files", "note", "timeout_ms", "check_only")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    CHECK_ONLY_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    config_json: bytes
    tokenizer_sha256: str
    files: _containers.RepeatedCompositeFieldContainer[PublishFile]
    note: str
    timeout_ms: int
    check_only: bool
    def __init__(self, teacher: _Optional[str] = ..., config_json: _Optional[bytes] = ..., tokenizer_sha256: _Optional[str] = ..., files: _Optional[_Iterable[_Union[PublishFile, _Mapping]]] = ..., note: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., check_only: bool = ...) -> None: ...

class PublishFile(_message.Message):
    __slots__ = ("name", "bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class PublishData(_message.Message):
    __slots__ = ("file", "offset", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: int
    offset: int
    data: bytes
    def __init__(self, file: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PublishDown(_message.Message):
    __slots__ = ("stage", "revision", "have", "message", "fingerprint")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    stage: PublishStage
    revision: str
    have: _containers.RepeatedScalarFieldContainer[int]
    message: str
    fingerprint: str
    def __init__(self, stage: _Optional[_Union[PublishStage, str]] = ..., revision: _Optional[str] = ..., have: _Optional[_Iterable[int]] = ..., message: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("server_version", "up_s", "teachers", "tenants", "store", "edges")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    UP_S_FIELD_NUMBER: _ClassVar[int]
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    up_s: float
    teachers: _containers.RepeatedCompositeFieldContainer[TeacherStatus]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantStatus]
    store: StoreStatus
    edges: _containers.RepeatedCompositeFieldContainer[EdgeStatus]
    def __init__(self, server_version: _Optional[str] = ..., up_s: _Optional[float] = ..., teachers: _Optional[_Iterable[_Union[TeacherStatus, _Mapping]]] = ..., tenants: _Optional[_Iterable[_Union[TenantStatus, _Mapping]]] = ..., store: _Optional[_Union[StoreStatus, _Mapping]] = ..., edges: _Optional[_Iterable[_Union[EdgeStatus, _Mapping]]] = ...) -> None: ...

class TeacherStatus(_message.Message):
    __slots__ = ("name", "state", "message", "replicas", "replicas_wanted", "fingerprints", "queued_tokens", "queued_requests", "tokens_per_s", "batch_fill", "forwards", "forward_tokens", "answered", "failed", "expired", "cancelled", "refused", "retries", "healthy", "failed_forwards", "given_up", "generate_calls", "generate_running", "generate_waiting", "generated_samples", "generated_tokens", "latencies", "interactive_queued_tokens", "interactive_queued_requests", "interactive_forwards", "interactive_tokens", "interactive_answered")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_FILL_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    GENERATE_CALLS_FIELD_NUMBER: _ClassVar[int]
    GENERATE_RUNNING_FIELD_NUMBER: _ClassVar[int]
    GENERATE_WAITING_FIELD_NUMBER: _ClassVar[int]
    GENERATED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    message: str
    replicas: int
    replicas_wanted: int
    fingerprints: _containers.RepeatedScalarFieldContainer[str]
    queued_tokens: int
    queued_requests: int
    tokens_per_s: float
    batch_fill: float
    forwards: int
    forward_tokens: int
    answered: int
    failed: int
    expired: int
    cancelled: int
    refused: int
    retries: int
    healthy: int
    failed_forwards: int
    given_up: int
    generate_calls: int
    generate_running: int
    generate_waiting: int
    generated_samples: int
    generated_tokens: int
    latencies: _containers.RepeatedCompositeFieldContainer[LatencyStatus]
    interactive_queued_tokens: int
    interactive_queued_requests: int
    interactive_forwards: int
    interactive_tokens: int
    interactive_answered: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., message: _Optional[str] = ..., replicas: _Optional[int] = ..., replicas_wanted: _Optional[int] = ..., fingerprints: _Optional[_Iterable[str]] = ..., queued_tokens: _Optional[int] = ..., queued_requests: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., batch_fill: _Optional[float] = ..., forwards: _Optional[int] = ..., forward_tokens: _Optional[int] = ..., answered: _Optional[int] = ..., failed: _Optional[int] = ..., expired: _Optional[int] = ..., cancelled: _Optional[int] = ..., refused: _Optional[int] = ..., retries: _Optional[int] = ..., healthy: _Optional[int] = ..., failed_forwards: _Optional[int] = ..., given_up: _Optional[int] = ..., generate_calls: _Optional[int] = ..., generate_running: _Optional[int] = ..., generate_waiting: _Optional[int] = ..., generated_samples: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., latencies: _Optional[_Iterable[_Union[LatencyStatus, _Mapping]]] = ..., interactive_queued_tokens: _Optional[int] = ..., interactive_queued_requests: _Optional[int] = ..., interactive_forwards: _Optional[int] = ..., interactive_tokens: _Optional[int] = ..., interactive_answered: _Optional[int] = ...) -> None: ...

class LatencyStatus(_message.Message):
    __slots__ = ("stage", "count", "p50_s", "p90_s", "p99_s")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P90_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    stage: str
    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    def __init__(self, stage: _Optional[str] = ..., count: _Optional[int] = ..., p50_s: _Optional[float] = ..., p90_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...

class TenantStatus(_message.Message):
    __slots__ = ("name", "weight", "share", "tokens_per_s", "served_tokens", "queued_tokens", "inflight_tokens", "refused", "sent_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SERVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    share: float
    tokens_per_s: float
    served_tokens: int
    queued_tokens: int
    inflight_tokens: int
    refused: int
    sent_bytes: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., share: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., served_tokens: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., inflight_tokens: _Optional[int] = ..., refused: _Optional[int] = ..., sent_bytes: _Optional[int] = ...) -> None: ...

class StoreStatus(_message.Message):
    __slots__ = ("memory_hits", "disk_hits", "joined", "computed", "memory_bytes", "disk_bytes", "trouble", "unshared")
    MEMORY_HITS_FIELD_NUMBER: _ClassVar[int]
    DISK_HITS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    UNSHARED_FIELD_NUMBER: _ClassVar[int]
    memory_hits: int
    disk_hits: int
    joined: int
    computed: int
    memory_bytes: int
    disk_bytes: int
    trouble: str
    unshared: int
    def __init__(self, memory_hits: _Optional[int] = ..., disk_hits: _Optional[int] = ..., joined: _Optional[int] = ..., computed: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., trouble: _Optional[str] = ..., unshared: _Optional[int] = ...) -> None: ...

class EdgeStatus(_message.Message):
    __slots__ = ("node", "open_streams", "open_requests")
    NODE_FIELD_NUMBER: _ClassVar[int]
    OPEN_STREAMS_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    node: str
    open_streams: int
    open_requests: int
    def __init__(self, node: _Optional[str] = ..., open_streams: _Optional[int] = ..., open_requests: _Optional[int] = ...) -> None: ...
