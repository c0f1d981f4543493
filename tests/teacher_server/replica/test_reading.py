"""Tokenize from a student to a teacher's own tokenizer: engine, edge, TLS and tokens, tenants, and teachers that have none."""

import asyncio
import contextlib
import json

import numpy as np
import pytest

from teacher_server.config.backends import FakeBackend, TransformersBackend
from teacher_server.config.server import TeacherConfig
from teacher_server.replica import reading
from teacher_server.replica.engine import TeacherEngine
from teacher_server.replica.reading import Reader
from teacher_wire.artifacts.kinds.byte_table import of_artifact
from teacher_wire.core.errors import CapabilityError, MismatchError, UnavailableError
from teacher_wire.core.info import BYTE_TABLE
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.loopback import serve
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall, TokenizedRow
from teacher_wire.vocabulary.byte_table import END, UNUSED
from tests.published import EngineService
from tests.tiny import make_model

ASKED = json.dumps({"messages": [{"role": "user", "content": "the cat?"}]}).encode()
TEXTS = ["the old dog", "你好 🤖\r\n  x", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("reading") / "model", vocab=320)
