"""The connection to a teacher's server, as a teacher section of a config describes it.

In: the section; out: an address, credentials, a policy for the time in which the server is away, and clients. Training, labelling and
traces all connect by this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from student_trainer.config.teachers import TeacherConfig
from student_trainer.teachers.embedded import embedded_teacher
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.endpoint.client import DEFAULT_WINDOW_BYTES, TeacherClient
from teacher_wire.transport.channel import Credentials, check_connection


@dataclass(frozen=True)
class AwayPolicy:
    """How long a run waits for a teacher that does not answer.

    Attributes:
        wait_s: for its server at the start.
        retry_s: while a request is retried because the server is away.
        answer_s: for any part of the answer to a request that the server has taken, before it is made again.
    """

    wait_s: float
    retry_s: float
    answer_s: float


@dataclass(frozen=True)
class Connection:
    """How to reach one teacher.

    Attributes:
        name: which teacher of the server; empty if it has one.
        address: HOST:PORT of the server, or several with commas.
        credentials: TLS files, token, tenant and proxy.
        policy: for the time in which the server is away.
    """

    name: str
    address: str
    credentials: Credentials
    policy: AwayPolicy

    @classmethod
    def of(cls, teacher: TeacherConfig, address: str) -> Connection:
        """The connection that a teacher section describes to a server at `address`."""
        policy = AwayPolicy(teacher.wait_s, teacher.retry_s, teacher.answer_s)
        return cls(teacher.name, address, credentials_of(teacher), policy)

    def client(
        self, on_trouble: Callable[[TeacherWireError], None], window_bytes: int = DEFAULT_WINDOW_BYTES
    ) -> TeacherClient:
        """A client on the running event loop; `on_trouble` is called with each error that is retried."""
        return TeacherClient(
            self.address,
            credentials=self.credentials,
            window_bytes=window_bytes,
            retry_for_s=self.policy.retry_s,
            on_trouble=on_trouble,
            answer_s=self.policy.answer_s,
        )

    async def describe(self, client: TeacherClient) -> TeacherInfo:
        """What the teacher says of itself; waits for the server as the policy allows."""
        return await client.teacher(self.name, wait_for_s=self.policy.wait_s)


def credentials_of(teacher: TeacherConfig) -> Credentials:
    """TLS files, token, tenant and proxy."""
    files = teacher.ca_file, teacher.cert_file, teacher.key_file
    return Credentials.from_environment(*files, teacher.token_env, teacher.tenant, teacher.proxy)


def check_way(teacher: TeacherConfig) -> None:
    """Looks at everything that connecting needs, before anything slow is done.

    Raises:
        RequestError: naming the file, the token or the proxy that cannot be used.
    """
    if teacher.address is not None:
        check_connection(teacher.address, credentials_of(teacher))


@contextlib.contextmanager
def connections(teachers: Sequence[TeacherConfig], console: Console) -> Iterator[list[Connection]]:
    """A connection to each teacher while the block runs; embedded servers are started, and stopped at the end.

    Raises:
        RequestError: as `check_way`.
        ConfigError, RunError: as `embedded_teacher`.
    """
    with contextlib.ExitStack() as servers:
        yield [Connection.of(teacher, _address(teacher, servers, console)) for teacher in teachers]


def _address(teacher: TeacherConfig, servers: contextlib.ExitStack, console: Console) -> str:
    if teacher.address is not None:
        check_way(teacher)
        return teacher.address
    assert teacher.embedded is not None
    with console.status(f"starting the embedded teacher of {teacher.embedded}"):
        return servers.enter_context(embedded_teacher(teacher.embedded))
