"""The signal `given`: 8 bytes a token over the real wire, from a model, through both label stores; and what is refused of it."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import LabelRequest
from student_trainer.labels.rows_on_device import rows_on
from student_trainer.labels.service import LabelService
from student_trainer.losses.rows import GivenRows
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CapabilityError, LabelError, MismatchError, RequestError, TeacherWireError
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.score.signals import Given, Hidden, spec_of
from teacher_wire.testing.fake_teacher import FAKE_SIGNALS, FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.seams.test_signal_kind import served

ROWS = [[5, 9, 200, 7, 3, 3, 8], [1, 2], [40, 41, 42, 43]]
WANTED = [[False, True, True, False, True, True, False], [True, False], [False, False, True, False]]
SPEC = spec_of("given", 300)


def batch():
    return TokenBatch.pack(ROWS, WANTED)


def ask(address, tmp_path, spec=SPEC):
    async def run():
        async with TeacherClient(address) as client:
            info = await client.teacher()
        desk = LabelService(lambda: TeacherClient(address), LabelStore(tmp_path / "labels"))
        async with desk.source(info, spec) as source:
            first = await source.labels(LabelRequest(batch(), tuple("abc")))
        async with desk.source(info, spec) as source:
            again = await source.labels(LabelRequest(batch().select([2, 0]), ("c", "a")))
        return info, first, again

    return asyncio.run(run())


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_is_what_the_model_says_of_each_wanted_token(model_factory, tmp_path, deterministic):
    folder = model_factory("qwen2")
    with served(folder, deterministic=deterministic) as (address, _):
        info, first, again = ask(address, tmp_path)
    assert "given" in info.transports
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    want, lse = [], []
    with torch.no_grad():
        for ids, wanted in zip(ROWS, WANTED, strict=True):
            z_LV = model(torch.tensor([ids])).logits[0, :, :300]
            for t in np.flatnonzero(wanted):
                want.append(float(z_LV[t].log_softmax(-1)[ids[t + 1]]))
                lse.append(float(z_LV[t].logsumexp(-1)))
    found = first.signals
    assert set(found.tensors) == {"lse_N", "label_logp_N"} and found.payload_bytes == 8 * len(want)
    np.testing.assert_allclose(found.label_logp_N.array, want, atol=1e-4)
    np.testing.assert_allclose(found.lse_N.array, lse, atol=1e-4)
    assert again.usage.disk_share == 1
    np.testing.assert_array_equal(again.signals.label_logp_N.array, found.label_logp_N.array[[5, 0, 1, 2, 3]])
    rows = rows_on(LabelTensors.of(found), None, torch.device("cpu"))
    assert isinstance(rows, GivenRows) and rows.label_logp_N.shape == (6,)


def test_the_fake_gives_it_and_beside_others(tmp_path):
    with serve(FakeTeacher(vocab_rows=300)) as running:
        _, alone, _ = ask(running.address, tmp_path)
        _, beside, _ = ask(running.address, tmp_path, SignalSpec(300, (Hidden(), Given())))
    np.testing.assert_array_equal(alone.signals.label_logp_N.array, beside.signals.label_logp_N.array)
    assert set(beside.signals.tensors) == {"lse_N", "label_logp_N", "hidden_ND"}


@pytest.mark.parametrize("mistake", ["truncated", "nan", "foreign"])
def test_what_the_numbers_alone_show_to_be_wrong_is_refused(tmp_path, mistake):
    with serve(FakeTeacher(vocab_rows=300, mistake=mistake)) as running, pytest.raises(TeacherWireError) as caught:
        ask(running.address, tmp_path)
    assert type(caught.value) in (LabelError, MismatchError)
    assert not list((tmp_path / "labels").rglob("*.labels*"))


def test_a_sample_of_its_rows_is_no_answer():
    with pytest.raises(RequestError, match="given labels need lse and logp"):
        SignalSpec(300, (Given(),), "sampled")


def test_a_teacher_that_is_older_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(FAKE_SIGNALS, "given")
    with serve(FakeTeacher(vocab_rows=300)) as running, pytest.raises(CapabilityError, match="given"):
        ask(running.address, tmp_path)
