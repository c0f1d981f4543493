"""The connection to a teacher's server, as a teacher section of a config describes it.

In: the section; out: an address, credentials, a policy for the time in which the server is away, and clients. Training, labelling and
traces all connect by this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from student_trainer.config.teachers import TeacherConfig
from student_trainer.errors import ConfigError
from student_trainer.teachers.embedded import embedded_teacher
from student_trainer.teachers.offline.client import OfflineTeacher
from teacher_wire.core.errors import MismatchError, TeacherWireError
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
        fingerprint: the teacher's must begin so; empty for any.
        offline: answers in place of a server that is never asked; None for one that is.
        place: where it is, in the words of its section, by which its record is found again.
    """

    name: str
    address: str
    credentials: Credentials
    policy: AwayPolicy
    fingerprint: str = ""
    offline: OfflineTeacher | None = None
    place: str = ""

    @classmethod
    def of(cls, teacher: TeacherConfig, address: str) -> Connection:
        """The connection that a teacher section describes to a server at `address`."""
        policy = AwayPolicy(teacher.wait_s, teacher.retry_s, teacher.answer_s)
        return cls(
            teacher.name, address, credentials_of(teacher), policy, teacher.fingerprint, place=teacher.place or address
        )

    @classmethod
    def without(cls, teacher: TeacherConfig, cache_dir: Path) -> Connection:
        """In place of a connection: what is kept of a teacher that is not to be asked."""
        policy = AwayPolicy(0.0, 0.0, teacher.answer_s)
        kept = OfflineTeacher(teacher, cache_dir)
        return cls(teacher.name, kept.address, Credentials(), policy, teacher.fingerprint, kept, teacher.place)

    def client(
        self, on_trouble: Callable[[TeacherWireError], None], window_bytes: int = DEFAULT_WINDOW_BYTES
    ) -> TeacherClient:
        """A client on the running event loop; `on_trouble` is called with each error that is retried."""
        if self.offline is not None:
            return self.offline
        return TeacherClient(
            self.address,
            credentials=self.credentials,
            window_bytes=window_bytes,
            retry_for_s=self.policy.retry_s,
            on_trouble=on_trouble,
            answer_s=self.policy.answer_s,
        )

    async def describe(self, client: TeacherClient) -> TeacherInfo:
        """What the teacher says of itself; waits for the server as the policy allows.

        Raises:
            MismatchError: it is not the one that the section's `fingerprint` names.
            OfflineError: it is offline, and not known.
        """
        info = await client.teacher(self.name, wait_for_s=self.policy.wait_s)
        if not info.fingerprint.startswith(self.fingerprint):
            raise MismatchError(
                f"teacher {info.name!r} is not the one that the config names by its fingerprint: its weights, or how they are run, are others",
                field="teacher.fingerprint", value=info.fingerprint[:16], limit=self.fingerprint[:16],
            )  # fmt: skip
        return info


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
def connections(
    teachers: Sequence[TeacherConfig], console: Console, cache_dir: Path | None = None
) -> Iterator[list[Connection]]:
    """A connection to each teacher while the block runs; embedded servers are started, and stopped at the end.

    Args:
        teachers: their sections.
        console: told while a server starts.
        cache_dir: where offline teachers are known from; None for a command that can do nothing without a teacher that answers.

    Raises:
        RequestError: as `check_way`.
        ConfigError, RunError: as `embedded_teacher`; or a teacher is offline and must be asked.
    """
    with contextlib.ExitStack() as servers:
        yield [_connection(teacher, servers, console, cache_dir) for teacher in teachers]


def _connection(
    teacher: TeacherConfig, servers: contextlib.ExitStack, console: Console, cache_dir: Path | None
) -> Connection:
    if not teacher.offline:
        return Connection.of(teacher, _address(teacher, servers, console))
    if cache_dir is None:
        raise ConfigError(
            "teacher.offline=true: the teacher is to write, and cannot while it is not asked; set offline=false"
        )
    return Connection.without(teacher, cache_dir)


def _address(teacher: TeacherConfig, servers: contextlib.ExitStack, console: Console) -> str:
    if teacher.address is not None:
        check_way(teacher)
        return teacher.address
    assert teacher.embedded is not None
    with console.status(f"starting the embedded teacher of {teacher.embedded}"):
        return servers.enter_context(embedded_teacher(teacher.embedded))
