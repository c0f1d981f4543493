"""Whom a run asks while it moves its own teacher: a revision of its own, whatever it was told, and never anybody else's."""

import asyncio
from dataclasses import replace

import pytest

from student_trainer.labels.lineage import FollowingSource, Lineage, origin_of, read_ledger
from student_trainer.labels.source import LabelRequest, LabelUsage
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import MismatchError, ServerError
from teacher_wire.labels.store import LabelStore
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher

SPEC = spec_of("top_k", 64, k=4)
REQUEST = LabelRequest(TokenBatch.pack([[1, 2, 3], [4, 5]]), ("a", "b"))


class Client:
    """A teacher whose weights are replaced; the old ones are gone at once."""

    def __init__(self):
        self.asked, self.problem = [], None
        self.become("")

    def become(self, revision, seed=0):
        self.fake = FakeTeacher(seed=seed)
        self.info = replace(self.fake.teacher_info(), revision=revision)

    async def teacher(self, name):
        return self.info

    async def score(self, info, spec, batch):
        self.asked.append(info.fingerprint)
        await asyncio.sleep(0)
        if self.problem is not None:
            raise self.problem
        if info.fingerprint != self.info.fingerprint:
            raise MismatchError(
                "another teacher", field="fingerprint", value=info.fingerprint, limit=self.info.fingerprint
            )
        return replace(self.fake.signals(spec, batch), fingerprint=info.fingerprint)

    async def close(self):
        pass


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def lineage(client, tmp_path):
    return Lineage(client.info, tmp_path / "revisions.jsonl")


def source_of(lineage, client, store=None):
    return FollowingSource(lineage, lambda: client, SPEC, lambda signals, request: None, store, LabelUsage())


async def test_a_request_that_meets_new_weights_is_made_again_of_them_and_kept_under_their_name(
    client, lineage, tmp_path
):
    store = LabelStore(tmp_path / "labels", 1 << 20)
    source, first = source_of(lineage, client, store), client.info.fingerprint
    assert (await source.labels(REQUEST)).signals.fingerprint == first
    lineage.announce(2, "r1")
    lineage.coming(1)
    client.become("r1", seed=1)
    other = LabelRequest(TokenBatch.pack([[7, 8, 9]]), ("c",))
    waiting = asyncio.create_task(source.labels(other))
    await asyncio.sleep(0.15)
    assert not waiting.done(), "word of the revision is on its way"
    lineage.live(2, "r1", client.info)
    lineage.coming(-1)
    found = (await waiting).signals
    assert found.fingerprint == client.info.fingerprint != first
    expected = client.fake.signals(SPEC, other.batch)
    assert (found["label_logp_N"].array == expected["label_logp_N"].array).all()
    again = await source.labels(REQUEST)  # of the new weights, not from the disk
    assert again.signals.fingerprint == client.info.fingerprint and again.usage.teacher_sequences == 2
    assert (await source.labels(other)).usage.disk_sequences == 1
    assert lineage.fingerprints == {first, client.info.fingerprint}


async def test_a_revision_that_went_live_although_we_were_told_otherwise_is_ours(client, lineage):
    lineage.announce(2, "r1")
    client.become("r1", seed=1)
    assert (await source_of(lineage, client).labels(REQUEST)).signals.fingerprint == client.info.fingerprint


@pytest.mark.parametrize("revision", ["", "theirs"])
async def test_weights_of_somebody_else_are_never_learned_from(client, lineage, revision):
    lineage.announce(2, "r1")
    client.become(revision, seed=1)
    with pytest.raises(MismatchError) as caught:
        await source_of(lineage, client).labels(REQUEST)
    assert "none that this run has published" in caught.value.__notes__[0]


@pytest.mark.parametrize("problem", [ServerError("a fault"), MismatchError("a head", field="head")])
async def test_other_problems_are_no_reason_to_move(client, lineage, problem):
    lineage.coming(1)
    client.problem = problem
    with pytest.raises(type(problem)):
        await source_of(lineage, client).labels(REQUEST)


def test_the_ledger_survives_a_kill_and_drops_what_is_made_again(client, tmp_path):
    ledger = tmp_path / "revisions.jsonl"
    first = Lineage(client.info, ledger)
    first.used(0, "f0")
    first.announce(2, "r1")
    client.become("r1", seed=1)
    first.live(2, "r1", client.info)
    for batch in (1, 2, 3):
        first.used(batch, client.info.fingerprint)
    with ledger.open("a") as file:
        file.write('{"batch": 4, "finger')
    begun = read_ledger(ledger)[0]["origin"]
    assert origin_of(ledger, client.info) == begun != client.info.fingerprint
    foreign = replace(client.info, revision="x", fingerprint="e" * 64)
    assert origin_of(ledger, foreign) == foreign.fingerprint
    assert origin_of(tmp_path / "none", client.info) == client.info.fingerprint
    Lineage(client.info, ledger, first_batch=2, origin=begun)
    kept = read_ledger(ledger)
    assert [entry["batch"] for entry in kept if "batch" in entry] == [0, 1] and kept[0] == {"origin": begun}
    assert sum("revision" in entry for entry in kept) == 2


def test_a_revision_of_another_teacher_moves_nothing(client, lineage):
    lineage.live(2, "r1", replace(client.info, name="other", fingerprint="e" * 64))
    assert lineage.info == client.info
