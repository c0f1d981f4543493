"""The teacher's head on disk: fetched once, checked always."""

import numpy as np
import pytest

from student_trainer.teachers.artifact_cache import fetch_head
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve


class Counting(FakeTeacher):
    fetched = 0

    async def artifact_bytes(self, *args):
        self.fetched += 1
        return await super().artifact_bytes(*args)


async def test_fetched_once_and_equal(tmp_path):
    fake = Counting()
    with serve(fake) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            for _ in range(3):
                head = await fetch_head(client, info, tmp_path)
                np.testing.assert_array_equal(head.weight_VD.array, fake.weight_VD)
    assert fake.fetched == 1
    assert [path.suffix for path in (tmp_path / "heads").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
async def test_a_damaged_file_is_fetched_again(tmp_path, damage):
    fake = Counting()
    with serve(fake) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            await fetch_head(client, info, tmp_path)
            (path,) = (tmp_path / "heads").iterdir()
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-9]), "empty": b""}[damage])
            head = await fetch_head(client, info, tmp_path)
            np.testing.assert_array_equal(head.weight_VD.array, fake.weight_VD)
    assert fake.fetched == 2
