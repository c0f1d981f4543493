"""The mapper of Generate between the house's messages and the generated classes; see `codec` for the rest.

Encoding trusts its own side; decoding checks everything that the other machine could have got wrong.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from teacher_wire.core import tensor_codec
from teacher_wire.core.errors import LabelError, LimitError, RequestError, TensorError
from teacher_wire.core.info import Limits, TeacherInfo
from teacher_wire.core.parsing import check_names
from teacher_wire.core.tensor import Tensor
from teacher_wire.generate.messages import MAX_STOP_IDS, Finish, GenerateCall, PromptBatch, Sample, SamplingSpec
from teacher_wire.v2 import teacher_pb2 as pb

MAX_HAVE = 1 << 16  # pairs, where no limits of a teacher are known

_FINISH_CODE: dict[Finish, pb.FinishReason] = {"stop": pb.STOP, "length": pb.LENGTH}
_FINISH_NAME = {code: name for name, code in _FINISH_CODE.items()}


def encode_generate(call: GenerateCall) -> pb.GenerateRequest:
    """A call on its way up."""
    spec = call.spec
    have = np.array(sorted(call.have), np.int32).reshape(-1, 2)
    return pb.GenerateRequest(
        teacher=call.teacher,
        fingerprint=call.fingerprint,
        token_ids=tensor_codec.encode(Tensor("int32", call.prompts.token_ids_T)),
        cu_lengths=tensor_codec.encode(Tensor("int32", call.prompts.cu_lengths_B1)),
        sampling=pb.SamplingSpec(
            samples=spec.samples,
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_new_tokens=spec.max_new_tokens,
            seed=spec.seed,
            stop_ids=spec.stop_ids,
            ignore_eos=spec.ignore_eos,
            json_schema=spec.json_schema.encode(),
        ),
        have=tensor_codec.encode(Tensor("int32", have)) if len(have) else None,
        timeout_ms=round(call.timeout_s * 1000),
    )


def decode_generate(request: pb.GenerateRequest, tenant: str, limits: Limits | None = None) -> GenerateCall:
    """A call that arrived, checked for form (against a teacher: see `generation.check_generate`).

    Args:
        request: what arrived.
        tenant: who calls.
        limits: of the teacher; no more pairs of `have` are looked at than they admit samples.

    Raises:
        RequestError: naming the field.
    """
    check_names(request, "teacher", "fingerprint")
    sampling = request.sampling
    if len(sampling.stop_ids) > MAX_STOP_IDS:  # before they are walked
        limit = f"at most {MAX_STOP_IDS} ids"
        raise RequestError("stop ids", field="stop_ids", value=len(sampling.stop_ids), limit=limit)
    if limits is not None and len(sampling.json_schema) > limits.max_schema_bytes:
        value = f"{len(sampling.json_schema)} bytes"
        raise LimitError("the schema is too long", field="json_schema", value=value, limit=limits.max_schema_bytes)
    try:
        schema = sampling.json_schema.decode()
    except UnicodeDecodeError as error:
        raise RequestError("not UTF-8", field="json_schema", value=f"byte {error.start}") from None
    spec = SamplingSpec(
        samples=sampling.samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        stop_ids=tuple(sampling.stop_ids),
        ignore_eos=sampling.ignore_eos,
        json_schema=schema,
    )
    prompts = PromptBatch(_int32(request.token_ids, "token_ids"), _int32(request.cu_lengths, "cu_lengths"))
    have = _decode_have(request, spec, prompts, limits) if request.HasField("have") else frozenset()
    return GenerateCall(request.teacher, request.fingerprint, spec, prompts, have, request.timeout_ms / 1000, tenant)


def _decode_have(
    request: pb.GenerateRequest, spec: SamplingSpec, prompts: PromptBatch, limits: Limits | None
) -> frozenset[tuple[int, int]]:
    """The pairs in `have`, looked at as arrays until they are known to be few, in range and distinct."""
    have_M2 = _int32(request.have, "have")
    if have_M2.ndim != 2 or have_M2.shape[1] != 2:
        raise RequestError("pairs of prompt and sample", field="have", value=list(have_M2.shape), limit="[M, 2]")
    asked = prompts.prompts * spec.samples
    most = min(asked, MAX_HAVE if limits is None else limits.max_request_sequences * limits.max_samples)
    if len(have_M2) > most:
        raise LimitError("more pairs than samples", field="have", value=len(have_M2), limit=most)
    if not len(have_M2):
        return frozenset()
    wrong_M = ((have_M2 < 0) | (have_M2 >= (prompts.prompts, min(spec.samples, 2**31 - 1)))).any(1)
    if wrong_M.any():
        pair = tuple(have_M2[int(np.argmax(wrong_M))].tolist())
        limit = f"{prompts.prompts} prompts, {spec.samples} samples"
        raise RequestError("no such sample", field="have", value=pair, limit=limit)
    places_M = have_M2[:, 0].astype(np.int64) * spec.samples + have_M2[:, 1]
    if len(np.unique(places_M)) != len(places_M):
        raise RequestError("a pair is there twice", field="have", value=f"{len(places_M)} pairs", limit="each once")
    return frozenset(zip(have_M2[:, 0].tolist(), have_M2[:, 1].tolist(), strict=True))


def _int32(message: pb.Tensor, field: str) -> np.ndarray:
    tensor = tensor_codec.decode(message, field)
    if tensor.dtype != "int32":
        raise TensorError("wrong dtype", field=field, value=tensor.dtype, limit="int32")
    return tensor.array


def encode_sample(sample: Sample) -> pb.GenerateDown:
    """A finished sample on its way down."""
    message = pb.Sample(
        prompt=sample.prompt,
        index=sample.index,
        token_ids=tensor_codec.encode(Tensor("int32", sample.token_ids_n)),
        token_logp=tensor_codec.encode(Tensor("float32", sample.token_logp_n)),
        finish=_FINISH_CODE[sample.finish],
    )
    return pb.GenerateDown(sample=message)


def encode_end(samples: int, fingerprint: str) -> pb.GenerateDown:
    """The last message of a call."""
    return pb.GenerateDown(done=pb.GenerateDone(samples=samples, fingerprint=fingerprint))


def decode_sample(
    message: pb.Sample, call: GenerateCall, info: TeacherInfo, received: Container[tuple[int, int]]
) -> Sample:
    """A sample that arrived, after those `received`.

    Raises:
        LabelError: not asked for, had already, of wrong ids or shapes, or longer than asked.
    """
    place = (int(message.prompt), int(message.index))
    where = f"prompt {place[0]}, sample {place[1]}"
    if not (place[0] < call.prompts.prompts and place[1] < call.spec.samples):
        raise LabelError("a sample that was not asked for", field="sample", value=where)
    if place in received:
        raise LabelError("the same sample twice", field="sample", value=where)
    if message.finish not in _FINISH_NAME:
        raise LabelError("unknown finish", field=f"finish of {where}", value=message.finish)
    try:
        ids, logp = (
            tensor_codec.decode(message.token_ids, "token_ids"),
            tensor_codec.decode(message.token_logp, "token_logp"),
        )
    except TensorError as error:
        raise LabelError(error.message, field=error.field, value=error.value, limit=error.limit) from error
    count = ids.array.size
    if (ids.dtype, logp.dtype) != ("int32", "float32") or ids.shape != (count,) or logp.shape != (count,):
        shown = f"{ids.dtype}{list(ids.shape)}, {logp.dtype}{list(logp.shape)}"
        raise LabelError("wrong shape or dtype", field=where, value=shown, limit="int32[n], float32[n]")
    if not 1 <= count <= call.spec.max_new_tokens:
        raise LabelError("tokens of a sample", field=where, value=count, limit=f"1..{call.spec.max_new_tokens}")
    if ids.array.min() < 0 or ids.array.max() >= info.vocab_rows:
        value = int(ids.array.min() if ids.array.min() < 0 else ids.array.max())
        raise LabelError("id outside the vocabulary", field=where, value=value, limit=info.vocab_rows - 1)
    if not bool((logp.array <= 1e-3).all()):  # false for NaN
        raise LabelError("no log-probability", field=where, value=float(logp.array.max()), limit="<= 0")
    return Sample(*place, ids.array, logp.array, _FINISH_NAME[message.finish])


def check_end(done: pb.GenerateDone, call: GenerateCall, received: int) -> None:
    """Refuses an end that comes before everything, or from another teacher.

    Raises:
        LabelError: naming both numbers.
    """
    if done.samples != received or received != call.samples:
        raise LabelError("samples are missing", field="samples", value=received, limit=call.samples)
    if call.fingerprint and done.fingerprint != call.fingerprint:
        raise LabelError(
            "another teacher answered", field="fingerprint", value=done.fingerprint, limit=call.fingerprint
        )
