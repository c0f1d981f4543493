"""The server's status between its messages and the protocol. Fields of both have the same names, so there is no table.

In: ServerStatus; out: StatusReply, and back. Unknown fields of a newer server are left out.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from teacher_wire.core.status import EdgeStatus, LatencyStatus, ServerStatus, StoreStatus, TeacherStatus, TenantStatus
from teacher_wire.v2 import teacher_pb2 as pb


def encode_status(status: ServerStatus) -> pb.StatusReply:
    """What Status answers."""
    return pb.StatusReply(
        server_version=status.server_version,
        up_s=status.up_s,
        teachers=[_encode_teacher(teacher) for teacher in status.teachers],
        tenants=[pb.TenantStatus(**vars(tenant)) for tenant in status.tenants],
        store=pb.StoreStatus(**vars(status.store)),
        edges=[pb.EdgeStatus(**vars(edge)) for edge in status.edges],
    )


def _encode_teacher(teacher: TeacherStatus) -> pb.TeacherStatus:
    values = {**vars(teacher), "latencies": [pb.LatencyStatus(**vars(latency)) for latency in teacher.latencies]}
    return pb.TeacherStatus(**values)


def decode_status(reply: pb.StatusReply) -> ServerStatus:
    """The status a server told."""
    return ServerStatus(
        server_version=reply.server_version,
        up_s=reply.up_s,
        teachers=tuple(TeacherStatus(**_values(TeacherStatus, teacher)) for teacher in reply.teachers),
        tenants=tuple(TenantStatus(**_values(TenantStatus, tenant)) for tenant in reply.tenants),
        store=StoreStatus(**_values(StoreStatus, reply.store)),
        edges=tuple(EdgeStatus(**_values(EdgeStatus, edge)) for edge in reply.edges),
    )


def _values(cls: type, message: Any) -> dict[str, Any]:
    values = {field.name: getattr(message, field.name) for field in fields(cls)}
    if cls is TeacherStatus:
        values["fingerprints"] = tuple(values["fingerprints"])
        values["latencies"] = tuple(LatencyStatus(**_values(LatencyStatus, entry)) for entry in values["latencies"])
    return values
