"""Publications between messages of the house and the protocol.

Encoding trusts its own side; decoding refuses with a RequestError or LimitError (towards a server) or a LabelError (towards a student).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from teacher_wire.core.errors import LabelError, LimitError, RequestError
from teacher_wire.core.parsing import check_name, check_names
from teacher_wire.publish.messages import (
    FILE_NAME,
    MAX_CONFIG_BYTES,
    MAX_FILES,
    MIN_FILE_BYTES,
    SHA256,
    Publication,
    RevisionFile,
)
from teacher_wire.v2 import teacher_pb2 as pb

PIECE_BYTES = 1 << 20
MAX_PIECE_BYTES = 4 << 20

RECEIVING = pb.PublishStage.RECEIVING
CHECKING = pb.PublishStage.CHECKING
DEPLOYING = pb.PublishStage.DEPLOYING
LIVE = pb.PublishStage.LIVE


def encode_open(publication: Publication) -> pb.PublishUp:
    """The first message of a call."""
    return pb.PublishUp(
        open=pb.PublishOpen(
            teacher=publication.teacher,
            config_json=publication.config_json,
            tokenizer_sha256=publication.tokenizer_sha256,
            files=[pb.PublishFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in publication.files],
            note=publication.note,
            timeout_ms=round(publication.timeout_s * 1000),
            check_only=publication.check_only,
        )
    )


def decode_open(message: pb.PublishUp, tenant: str) -> Publication:
    """What is to be published, checked for form.

    Raises:
        RequestError, LimitError: naming the field.
    """
    if message.WhichOneof("message") != "open":
        raise RequestError("the first message of a call says what is published", field="open", value="missing")
    opened = message.open
    check_names(opened, "teacher", "note")
    if len(opened.config_json) > MAX_CONFIG_BYTES:
        raise LimitError("too long", field="config_json", value=len(opened.config_json), limit=MAX_CONFIG_BYTES)
    _check_digest("tokenizer_sha256", opened.tokenizer_sha256)
    if not 1 <= len(opened.files) <= MAX_FILES:
        raise LimitError("a revision has files", field="files", value=len(opened.files), limit=f"1 to {MAX_FILES}")
    for place, file in enumerate(opened.files):
        check_name(f"files.{place}.name", file.name)
        if not FILE_NAME.fullmatch(file.name):
            raise RequestError(
                "only weights are taken, and only as safetensors", field=f"files.{place}.name", value=ascii(file.name),
                limit="model.safetensors, or model-00001-of-00002.safetensors and so on",
            )  # fmt: skip
        if file.bytes < MIN_FILE_BYTES:
            raise RequestError(
                "no safetensors file",
                field=f"files.{place}.bytes",
                value=file.bytes,
                limit=f"at least {MIN_FILE_BYTES}",
            )
        _check_digest(f"files.{place}.sha256", file.sha256)
    names = [file.name for file in opened.files]
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise RequestError("names rise, and come once each", field="files", value=ascii(", ".join(names)[:200]))
    files = tuple(RevisionFile(file.name, file.bytes, file.sha256) for file in opened.files)
    return Publication(
        opened.teacher, opened.config_json, opened.tokenizer_sha256, files, opened.note, opened.timeout_ms / 1000, tenant,
        opened.check_only,
    )  # fmt: skip


def encode_piece(file: int, offset: int, data: bytes) -> pb.PublishUp:
    """A slice of file number `file`."""
    return pb.PublishUp(data=pb.PublishData(file=file, offset=offset, data=data))


def decode_piece(message: pb.PublishUp, file: int, offset: int, size: int) -> bytes:
    """The bytes of a piece, which must be the next one.

    Args:
        message: of the student.
        file, offset: that are wanted.
        size: bytes that the file still lacks.

    Raises:
        RequestError, LimitError: it is another one, empty, or too long.
    """
    if message.WhichOneof("message") != "data":
        raise RequestError("pieces of files follow the first message", field="data", value="missing")
    piece = message.data
    if (piece.file, piece.offset) != (file, offset):
        raise RequestError(
            "pieces come in order",
            field="data",
            value=f"file {piece.file} from {piece.offset}",
            limit=f"file {file} from {offset}",
        )
    if not 1 <= len(piece.data) <= min(size, MAX_PIECE_BYTES):
        raise LimitError(
            "a piece of a wrong size", field="data.data", value=len(piece.data), limit=min(size, MAX_PIECE_BYTES)
        )
    return piece.data


def encode_stage(
    stage: pb.PublishStage,
    revision: str,
    *,
    have: Sequence[int] = (),
    message: str = "",
    fingerprint: str = "",
) -> bytes:
    """How far a publication is, as it travels."""
    return pb.PublishDown(
        stage=stage, revision=revision, have=have, message=message, fingerprint=fingerprint
    ).SerializeToString()


def decode_have(down: pb.PublishDown, publication: Publication) -> tuple[int, ...]:
    """How much of each file the server holds.

    Raises:
        LabelError: it is no first answer to this publication.
    """
    have, sizes = tuple(down.have), [file.bytes for file in publication.files]
    if (
        down.stage != RECEIVING
        or down.revision != publication.revision
        or len(have) != len(sizes)
        or any(held > size for held, size in zip(have, sizes, strict=True))
    ):
        raise LabelError(
            "the server's first answer fits no such publication",
            field="PublishDown",
            value=f"stage {down.stage}, {len(have)} files",
        )
    return have


def _check_digest(field: str, text: str) -> None:
    if not SHA256.fullmatch(text):
        raise RequestError(
            "no SHA-256", field=field, value=ascii(text[:64]), limit="64 hexadecimal digits, in small letters"
        )
