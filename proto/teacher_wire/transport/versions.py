"""Two sides of different protocol versions: each is told so by name, whichever of the two is the older.

In: a call of another version, or a server that knows none of ours; out: a refusal that names both versions. Describe is never
refused: its reply begins with the server's version in every version of the protocol, and the student compares.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import grpc

from teacher_wire import PROTOCOL
from teacher_wire.core.errors import CapabilityError, TeacherWireError
from teacher_wire.transport import status_table
from teacher_wire.transport.caller import Context
from teacher_wire.v2 import teacher_pb2 as pb

# A caller that still writes when its call ends may see gRPC's own "internal error" in place of our refusal.
_HEARD_OUT_S = 0.25
_METHOD = re.compile(r"/teacher_wire\.v([0-9]{1,6})\.Teacher/(\w+)")


class OtherVersions(grpc.GenericRpcHandler):
    """Answers the calls of every other protocol version: Describe with our version, the rest with a CapabilityError."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        found = _METHOD.fullmatch(details.method)
        if found is None or int(found[1]) == PROTOCOL:
            return None
        if found[2] == "Describe":
            return grpc.unary_unary_rpc_method_handler(_describe)
        refusal = difference(int(found[1]), PROTOCOL)

        async def refuse(_requests: Any, context: Context) -> None:
            detail = status_table.to_detail(refusal).SerializeToString()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARD_OUT_S):
                    while await context.read() is not grpc.aio.EOF:
                        pass
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(refusal), ((status_table.DETAIL_KEY, detail),))

        return grpc.stream_stream_rpc_method_handler(refuse)


async def _describe(_data: bytes, _context: Context) -> bytes:
    return pb.DescribeReply(protocol=PROTOCOL).SerializeToString()


def difference(student: int, server: int, address: str = "") -> CapabilityError:
    """Student and server speak these two versions of the protocol; `address` is that of the server."""
    older = "student" if student < server else "server"
    return CapabilityError(
        f"{address and f'{address}: '}the student speaks version {student} of the protocol, the server version {server}: upgrade the {older}",
        field="protocol", value=student if older == "student" else server, limit=max(student, server),
    )  # fmt: skip


def no_teacher(refused: TeacherWireError) -> TeacherWireError:
    """A refusal of our Describe by a server that speaks no version of the protocol; one that names its reason stays as it is."""
    if refused.field != "address":
        return refused
    return CapabilityError(
        f"{refused.message}: another program answers there, no teacher-server", field="address", value=refused.value
    )


async def of_older_server(channel: grpc.aio.Channel, metadata: Any, timeout_s: float) -> int | None:
    """The version of a server that does not know our Describe; None if it is no teacher server at all."""
    for version in range(PROTOCOL - 1, 0, -1):
        describe = channel.unary_unary(f"/teacher_wire.v{version}.Teacher/Describe")
        try:
            await describe(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError:
            continue
        return version
    return None
