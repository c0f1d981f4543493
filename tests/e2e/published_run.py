"""A run that publishes its student while another tenant asks the same teacher; every answer is held against the weights it names.

In: how many revisions; out: what happened. The student trains in this process, the server is a real one on Ray Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from student_trainer.config.run import parse_config
from student_trainer.labels.lineage import REVISIONS_NAME, read_ledger
from student_trainer.rollout.publication.publisher import Publisher
from student_trainer.training.run import train
from teacher_server.backends.model_folder import fingerprint
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import MismatchError, ServerError, TeacherWireError
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.transport.channel import Credentials
from tests.e2e.conftest import TRIED_ONCE, Server, server_config, serving, transformers_teacher
from tests.published import publication_of

SPEC = spec_of("top_k", 300, k=8)
EVERY = 2


@dataclass
class Asked:
    """What the other tenant met.

    Attributes:
        answers: batches and answers, by the fingerprint they came with.
        told: how often it heard that its weights are gone, and took the new ones.
        troubles: everything else that was not an answer, also what its client would have tried again.
        most_kept: whole revisions on the server's disk at a time.
    """

    answers: dict[str, list[tuple[TokenBatch, TeacherSignals]]] = field(default_factory=dict)
    told: int = 0
    troubles: list[TeacherWireError] = field(default_factory=list)
    most_kept: int = 0

    @property
    def counts(self) -> Counter[str]:
        return Counter({name[:12]: len(found) for name, found in self.answers.items()})


async def ask(address: str, stop: asyncio.Event, asked: Asked, seed: int, *, pinned: bool) -> None:
    """One student of another tenant, without pause."""
    rng = np.random.default_rng(seed)
    credentials = Credentials(tenant="other")
    async with TeacherClient(
        address, credentials=credentials, retry_for_s=0, on_trouble=asked.troubles.append
    ) as client:
        info = await client.teacher("me")
        while not stop.is_set():
            batch = TokenBatch.pack([rng.integers(0, 300, 12).tolist()])
            try:
                answer = await client.score(info if pinned else replace(info, fingerprint=""), SPEC, batch)
            except MismatchError:
                asked.told += 1
                info = await client.teacher("me")
                continue
            except TeacherWireError as error:
                asked.troubles.append(error)
                return
            assert not pinned or answer.fingerprint == info.fingerprint
            asked.answers.setdefault(answer.fingerprint, []).append((batch, answer))
            await asyncio.sleep(0.02)


def check_answers(asked: Asked, models: dict[str, Path]) -> None:
    """Every answer is that of the weights it names."""
    for name, answers in asked.answers.items():
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
        ids_BL = torch.from_numpy(np.stack([batch.token_ids_T for batch, _ in answers]).astype(np.int64))
        with torch.no_grad():
            logp_BLV = model(input_ids=ids_BL).logits[:, :-1].log_softmax(-1)
        expected_BN = logp_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0].numpy()
        given_BN = np.stack([answer["label_logp_N"].array for _, answer in answers])
        np.testing.assert_allclose(given_BN, expected_BN, atol=2e-4, rtol=1e-4)


async def keep_copies(revisions: Path, copies: Path, stop: asyncio.Event, asked: Asked) -> None:
    """Links of every revision, since the server deletes old ones."""
    while not stop.is_set():
        whole = [folder for folder in revisions.glob("*") if len(folder.name) == 64]
        asked.most_kept = max(asked.most_kept, len(whole))
        for folder in whole:
            if not (copies / folder.name).exists():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copytree(folder, copies / folder.name, copy_function=os.link)
        await asyncio.sleep(0.1)


async def publish_what_no_replica_can_load(server: Server, model: Path, broken: Path) -> None:
    """Weights that fit and are no numbers: refused by the replica that loads them, and the ones before stay."""
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    async with TeacherClient(server.address, credentials=Credentials(tenant="trainer"), retry_for_s=10) as client:
        before = await client.teacher("me")
        publication, sources = publication_of(broken, tokenizer_sha256=before.tokenizer_sha256)
        with pytest.raises(ServerError) as caught:
            await client.publish(publication, sources)
        assert "not finite" in str(caught.value), str(caught.value)
        assert (await client.teacher("me")).fingerprint == before.fingerprint


async def published_run(
    tmp_path: Path, model: Path, rows: Path, revisions: int, monkeypatch, *, broken_first: bool = False
) -> dict:
    """Trains, publishes so often, and checks all that must hold; what happened, for whoever prints it.

    With `broken_first` somebody publishes weights that no replica can load, before.
    """
    publish_again = Publisher.publish

    def one_after_the_other(self: Publisher, step: int) -> None:
        if self._thread is not None:  # tiny steps are faster than any roll
            self._thread.join()
        publish_again(self, step)

    monkeypatch.setattr(Publisher, "publish", one_after_the_other)
    kept = tmp_path / "revisions"
    me = transformers_teacher("me", model, publish={"tenants": ["trainer"], "keep": 2, "folder": str(kept)})
    config = server_config(me, store={"memory_mb": 0})
    run, copies, stop, asked = tmp_path / "run", tmp_path / "copies", asyncio.Event(), Asked()
    copies.mkdir()
    tree = {
        "run": {"output_dir": str(run), "cache_dir": str(tmp_path / "cache")},
        "model": {"path": str(model), "dtype": "float32", "lora": None},
        "data": {"train": [str(rows)]},
        "labels": {"transport": "top_k", "k": 16},
        "on_policy": {"share": 0, "publish": {"every": EVERY, "teacher": "me", "on_failure": "stop"}},
        "train": {
            "batch_size": 4,
            "accumulation": 1,
            "max_steps": EVERY * revisions,
            "learning_rate": 1e-2,
            "log_steps": 1,
        },
    }
    with serving(tmp_path, config, **TRIED_ONCE) as server:
        tree["teacher"] = {"address": server.address, "tenant": "trainer"}
        with (tmp_path / "run.log").open("w") as log:
            others = [asyncio.create_task(ask(server.address, stop, asked, n, pinned=n != 2)) for n in range(3)]
            others.append(asyncio.create_task(keep_copies(kept / "me", copies, stop, asked)))
            try:
                if broken_first:
                    await publish_what_no_replica_can_load(server, model, tmp_path / "broken")
                await asyncio.to_thread(train, parse_config(tree, "test"), console=Console(file=log, width=200))
                await asyncio.sleep(2.0)  # the newest weights are asked too
            finally:
                stop.set()
                await asyncio.gather(*others)
        async with asyncio.timeout(30):  # the last roll has ended: old revisions go
            while len([path for path in (kept / "me").iterdir() if len(path.name) == 64]) > 2:
                await asyncio.sleep(0.2)
    assert asked.most_kept <= 2 + 2, "publish.keep, one that is received, one while replicas change"
    assert asked.troubles == [], (tmp_path / "run.log").read_text()
    models = {fingerprint(folder, "float32"): folder for folder in copies.iterdir()}
    models[fingerprint(model, "float32")] = model
    check_answers(asked, models)

    ledger = read_ledger(run / REVISIONS_NAME)
    live = [entry for entry in ledger if "revision" in entry and "fingerprint" in entry]
    used = {entry["batch"]: entry["fingerprint"] for entry in ledger if "batch" in entry}
    assert ledger[0] == {"origin": fingerprint(model, "float32")}
    assert [entry["step"] for entry in live] == [EVERY * number for number in range(1, revisions + 1)]
    assert {entry["fingerprint"] for entry in live} <= set(models) and len(
        {entry["fingerprint"] for entry in live}
    ) == revisions
    assert sorted(used) == list(range(EVERY * revisions)) and set(used.values()) <= set(models)
    final, newest = (
        load_file(run / "final" / "model.safetensors"),
        load_file(copies / live[-1]["revision"] / "model.safetensors"),
    )
    assert final.keys() == newest.keys() and all(torch.equal(final[name], newest[name]) for name in final)
    assert not (run / ".publishing").exists()
    return {
        "answers": dict(asked.counts),
        "told": asked.told,
        "labels of": Counter(name[:12] for name in used.values()),
        "server": server,
    }
