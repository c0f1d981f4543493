"""Tokenize between the house's messages and the protocol.

Encoding trusts its own side; decoding refuses with a RequestError (towards a server) or a LabelError (towards a student).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teacher_wire.core import tensor_codec
from teacher_wire.core.errors import LabelError, LimitError, TensorError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.parsing import check_names, parse
from teacher_wire.core.tensor import Tensor
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall, TokenizedRow
from teacher_wire.v2 import teacher_pb2 as pb

MAX_MARKS = 4096  # of one row
_REASON_CHARS = 400  # of why a row is refused


def encode_request(call: TokenizeCall) -> pb.TokenizeRequest:
    """A call on its way up."""
    return pb.TokenizeRequest(
        teacher=call.teacher,
        fingerprint=call.fingerprint,
        timeout_ms=round(call.timeout_s * 1000),
        rows=map(_encode_text, call.rows),
    )


def _encode_text(row: TextRow) -> pb.TokenizeRow:
    marks = [pb.TokenizeMark(at=place, role=role) for place, role in row.marks]
    return pb.TokenizeRow(conversation=row.conversation, text=row.text, marks=marks)


def _decode_text(row: pb.TokenizeRow) -> TextRow:
    return TextRow(row.text, row.conversation, tuple((mark.at, mark.role) for mark in row.marks))


def decode_request(request: pb.TokenizeRequest, tenant: str, max_rows: int) -> TokenizeCall:
    """A call that arrived, its form checked (against a teacher: see `messages.check_tokenize`).

    Raises:
        RequestError: naming the field.
    """
    check_names(request, "teacher", "fingerprint")
    if len(request.rows) > max_rows:  # before they are walked
        raise LimitError("more than this teacher takes at once", field="rows", value=len(request.rows), limit=max_rows)
    for number, row in enumerate(request.rows):
        if len(row.marks) > MAX_MARKS:
            raise LimitError("too many", field=f"rows[{number}].marks", value=len(row.marks), limit=MAX_MARKS)
    rows = tuple(map(_decode_text, request.rows))
    return TokenizeCall(request.teacher, request.fingerprint, rows, request.timeout_ms / 1000, tenant)


def encode_reply(rows: Sequence[TokenizedRow], fingerprint: str) -> pb.TokenizeReply:
    """All rows of a call on their way down."""
    return pb.TokenizeReply(fingerprint=fingerprint, rows=map(_encode_row, rows))


def _encode_row(row: TokenizedRow) -> pb.TokenizedRow:
    message = pb.TokenizedRow(refused=row.refused)
    if not row.refused:
        tensor_codec.fill(message.token_ids, Tensor("int32", row.token_ids_T))
        tensor_codec.fill(message.byte_ends, Tensor("int32", row.byte_ends_C))
        message.prompt_tokens, message.ended, message.digest = row.prompt_tokens, row.ended, row.digest
    return message


def decode_reply(reply: pb.TokenizeReply, call: TokenizeCall, info: TeacherInfo) -> list[TokenizedRow]:
    """The rows that came back, one for each that was asked for.

    Raises:
        LabelError: of another teacher, too few or too many, or a row that is not what the protocol says.
    """
    if call.fingerprint and reply.fingerprint != call.fingerprint:
        raise LabelError(
            "another teacher answered", field="fingerprint", value=reply.fingerprint, limit=call.fingerprint
        )
    if len(reply.rows) != len(call.rows):
        raise LabelError("not one answer for each row", field="rows", value=len(reply.rows), limit=len(call.rows))
    return [
        _decode_row(message, row, f"rows[{number}]", info)
        for number, (message, row) in enumerate(zip(reply.rows, call.rows, strict=True))
    ]


def _decode_row(message: pb.TokenizedRow, asked: TextRow, where: str, info: TeacherInfo) -> TokenizedRow:
    if message.refused:  # shown to a person as it is
        reason = message.refused[:_REASON_CHARS]
        return TokenizedRow.refusal("".join(shown if shown.isprintable() else " " for shown in reason))
    ids_T, ends_C = _int32(message.token_ids, f"{where}.token_ids"), _int32(message.byte_ends, f"{where}.byte_ends")
    row = TokenizedRow(ids_T, message.prompt_tokens, ends_C, message.ended)
    if len(ends_C) != len(ids_T) - row.prompt_tokens:
        shown = f"{len(ends_C)} ends, {row.prompt_tokens} of {len(ids_T)} tokens in the prompt"
        raise LabelError("not one end for each token behind the prompt", field=f"{where}.byte_ends", value=shown)
    size = max(info.vocab_rows, info.tokenizer_size)
    if len(ids_T) and not (ids_T.min() >= 0 and ids_T.max() < size):
        raise LabelError(
            "id outside the vocabulary", field=f"{where}.token_ids", value=int(ids_T.max()), limit=size - 1
        )
    last = int(ends_C[-1]) if len(ends_C) else 0
    if last != len(asked.text) or bool((np.diff(ends_C, prepend=0) < 0).any()):
        raise LabelError(
            "ends that are not those of the text", field=f"{where}.byte_ends", value=last, limit=len(asked.text)
        )
    if row.ended and not len(ends_C):
        raise LabelError("an end without a token", field=f"{where}.ended")
    if row.digest != message.digest:
        raise LabelError(
            "the content has another digest than announced", field=f"{where}.digest",
            value=row.digest, limit=message.digest[:64],
        )  # fmt: skip
    return row


def texts_to_bytes(rows: Sequence[TextRow]) -> bytes:
    """Rows alone, for a process of one's own."""
    return pb.TokenizeRequest(rows=map(_encode_text, rows)).SerializeToString()


def texts_of_bytes(data: bytes) -> list[TextRow]:
    """The rows that `texts_to_bytes` wrote."""
    return list(map(_decode_text, parse(pb.TokenizeRequest, data).rows))


def row_to_bytes(row: TokenizedRow) -> bytes:
    """One answer, from a process of one's own."""
    return _encode_row(row).SerializeToString()


def row_of_bytes(data: bytes) -> TokenizedRow:
    """The answer that `row_to_bytes` wrote."""
    message = parse(pb.TokenizedRow, data)
    if message.refused:
        return TokenizedRow.refusal(message.refused)
    ids_T, ends_C = _int32(message.token_ids, "token_ids"), _int32(message.byte_ends, "byte_ends")
    return TokenizedRow(ids_T, message.prompt_tokens, ends_C, message.ended)


def _int32(message: pb.Tensor, field: str) -> np.ndarray:
    try:
        tensor = tensor_codec.decode(message, field)
    except TensorError as error:
        raise LabelError(error.message, field=error.field, value=error.value, limit=error.limit) from error
    if tensor.dtype != "int32" or len(tensor.shape) != 1:
        raise LabelError(
            "wrong dtype or shape", field=field, value=f"{tensor.dtype}{list(tensor.shape)}", limit="int32[n]"
        )
    return tensor.array
