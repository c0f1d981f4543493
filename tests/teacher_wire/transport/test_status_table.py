"""Errors cross the wire by name and keep what they say; bare codes of others find a class too."""

import pickle

import grpc
import pytest

from teacher_wire.core import errors
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.transport import status_table
from teacher_wire.v2 import teacher_pb2 as pb

BROKEN_OR_BUSY = {grpc.StatusCode[name] for name in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN")}
EVERY = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, TeacherWireError) and cls is not TeacherWireError
]


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_has_a_code_and_survives_the_wire(cls):
    error = cls("no", field="k", value=7, limit="1..5", retry_after_s=2.5)
    assert isinstance(status_table.code_of(error), grpc.StatusCode)
    back = status_table.from_detail(pb.ErrorDetail.FromString(status_table.to_detail(error).SerializeToString()))
    assert type(back) is cls and vars(back) == vars(error)
    assert str(back) == "no (field=k, value=7, limit=1..5)"


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_survives_a_process_border(cls):
    """Ray carries them between replicas and edge."""
    error = cls("no", field="k", value=7)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls and vars(back) == vars(error)


def test_an_unknown_kind_is_named_and_long_texts_are_cut_visibly():
    back = status_table.from_detail(pb.ErrorDetail(kind="NewError", message="hm"))
    assert isinstance(back, errors.ServerError) and "NewError" in str(back)
    cut = status_table.to_detail(errors.RequestError("x" * 5000, value="\0" * 5000))
    assert len(cut.message) == status_table.MAX_DETAIL_CHARS and cut.message.endswith("…")


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_grpc_code_becomes_one_of_ours(code):
    class Bare(grpc.RpcError):
        def code(self):
            return code

        def details(self):
            return None

    error = status_table.from_rpc(Bare(), "host:1")
    assert isinstance(error, TeacherWireError) and code.name in str(error)
    assert isinstance(error, status_table.RETRYABLE) == (code in BROKEN_OR_BUSY)
