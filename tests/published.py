"""What tests of publishing share: a model as a publication, an edge that takes it, and somebody who deploys what is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

from teacher_server.config.server import EdgeConfig, TeacherConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.publishing import blueprint
from teacher_server.publishing.revisions import Revisions, model_key, with_revision
from teacher_server.replica.engine import TeacherEngine
from teacher_server.telemetry.records import News, Plan, TeacherPlan
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.publish.messages import Publication, RevisionFile
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow
from tests.e2e.conftest import free_port

TOKENIZER = hashlib.sha256(b"a tokenizer").hexdigest()


def publication_of(model: Path, teacher: str = "me", **changes) -> tuple[Publication, list[Path]]:
    """A model folder as it is published, and where its files are."""
    sources = sorted(model.glob("*.safetensors"))
    files = tuple(RevisionFile.of(path) for path in sources)
    made = Publication(teacher, (model / "config.json").read_bytes(), TOKENIZER, files, "a test")
    return replace(made, **changes), sources


class Served:
    """A real engine that is replaced by one of the wanted weights; what names weights that are gone is refused, as by replicas."""

    def __init__(self, config: TeacherConfig) -> None:
        self._engine = TeacherEngine(config)
        self._started = False

    def teacher_info(self) -> TeacherInfo:
        return self._engine.info

    async def become(self, config: TeacherConfig) -> None:
        fresh = await asyncio.to_thread(TeacherEngine, config)
        fresh.start()
        before, self._engine = self._engine, fresh
        if self._started:
            await before.stop()
        self._started = True

    async def describe(self) -> list[TeacherInfo]:
        return [self._engine.info]

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        return self._engine.info

    async def score(self, call: ScoreCall) -> TeacherSignals:
        if not self._started:
            self._started = True
            self._engine.start()
        return await self._engine.score(call)

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        return await self._engine.artifact_header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return await self._engine.artifact_bytes(call, offset, size)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        return await self._engine.reader.tokenize(call)


class Deployer:
    """An edge before a teacher, and what `up` would do: whatever is wanted goes live, or is given up.

    Attributes:
        edge: listening.
        revisions: of the teacher `me`, whose config names `model`.
        refuses: deploys nothing more, and gives up what is wanted.
        idle: does nothing at all.
    """

    def __init__(
        self, folder: Path, model: Path, *, served: bool = False, edge: dict | None = None, **settings
    ) -> None:
        settings = {"tenants": ["trainer"], "folder": str(folder / "revisions"), **settings}
        backend = {"kind": "transformers", "model": str(model), "dtype": "float32", "device": "cpu"}
        self.config = TeacherConfig.model_validate({"name": "me", "backend": backend, "publish": settings})
        blueprint.make(self.config)
        self.teacher = Served(self.config) if served else FakeTeacher(name="me", tokenizer_sha256=TOKENIZER)
        self.edge = EdgeServer(
            EdgeConfig.model_validate({"port": free_port(), "drain_s": 0, **(edge or {})}), self.teacher
        )
        self.revisions = Revisions.of(self.config.publish, "me")
        self.deployed: list[str] = []
        self.refuses = self.idle = False
        self.news("")

    def news(self, revision: str) -> None:
        """Tells the edge what lives."""
        told = TeacherPlan("running", publish=self.config.publish, model=model_key(self.config))
        live = self.teacher.teacher_info()
        if revision and isinstance(self.teacher, FakeTeacher):
            live = replace(live, revision=revision, fingerprint=hashlib.sha256(revision.encode()).hexdigest())
        self.edge.publishing.take(News(Plan(teachers={"me": told}, open=True), {"me": (live,)}, 1))

    async def run(self) -> None:
        key = model_key(self.config)
        while True:
            wanted = self.revisions.wanted(key)
            if wanted and not self.idle and wanted[0] not in self.deployed[-1:]:
                if self.refuses:
                    self.revisions.drop(key, wanted[0], "it does not load")
                else:
                    if isinstance(self.teacher, Served):
                        await self.teacher.become(with_revision(self.config, wanted[0]))
                    self.deployed.append(wanted[0])
                    self.news(wanted[0])
            await asyncio.sleep(0.02)

    @property
    def incoming(self) -> Path:
        return self.revisions.folder / ".incoming"

    def folders(self) -> set[str]:
        """Whole revisions on the disk."""
        return {path.name for path in self.revisions.folder.iterdir() if len(path.name) == 64}


@contextlib.asynccontextmanager
async def publishing(folder: Path, model: Path, **settings) -> AsyncIterator[Deployer]:
    """A deployer at work while the block runs."""
    made = Deployer(folder, model, **settings)
    await made.edge.start()
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await made.edge.drain()


@contextlib.contextmanager
def published_beside(folder: Path, model: Path, **settings) -> Iterator[Deployer]:
    """A deployer of real engines in a thread of its own, for runs in this one."""
    loop = asyncio.new_event_loop()  # never closed: grpc's poller may still have word for it
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def on_loop(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def begin() -> tuple[Deployer, asyncio.Task[None]]:
        made = Deployer(folder, model, served=True, **settings)
        await made.edge.start()
        return made, asyncio.create_task(made.run())

    made, task = on_loop(begin())
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(task.cancel)
        on_loop(made.edge.drain())
        on_loop(made.teacher._engine.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
