"""The way to a teacher's server, as the section `teacher` of a config says.

In: the section; out: credentials, and a maker of clients. Whoever speaks to a teacher (training, labelling, traces) connects by this.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from student_trainer.config.run import TeacherConfig
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.endpoint.client import DEFAULT_WINDOW_BYTES, TeacherClient
from teacher_wire.transport.channel import Credentials, check_connection


def credentials_of(teacher: TeacherConfig) -> Credentials:
    """TLS files, token, tenant and proxy."""
    token = os.environ.get(teacher.token_env, "")
    return Credentials(teacher.ca_file, teacher.cert_file, teacher.key_file, token, teacher.tenant, teacher.proxy)


def check_way(teacher: TeacherConfig) -> None:
    """Looks at everything that connecting needs, before anything slow is done.

    Raises:
        RequestError: naming the file, the token or the proxy that cannot be used.
    """
    if teacher.address is not None:
        check_connection(teacher.address, credentials_of(teacher))


def connector(
    teacher: TeacherConfig,
    address: str,
    on_trouble: Callable[[TeacherWireError], None],
    window_bytes: int = DEFAULT_WINDOW_BYTES,
) -> Callable[[], TeacherClient]:
    """Makes clients of the server at `address`, on the loop that they are to run on."""
    return partial(
        TeacherClient,
        address,
        credentials=credentials_of(teacher),
        window_bytes=window_bytes,
        retry_for_s=teacher.retry_s,
        on_trouble=on_trouble,
        answer_s=teacher.answer_s,
    )
