"""What a backend is: a model that turns packed tokens into signals, and says honestly what it can.

Calls come from one thread at a time. A backend knows nothing of queues, tenants or the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals

if TYPE_CHECKING:
    from teacher_server.config.features import FeaturesConfig
    from teacher_server.config.server import GenerationConfig
    from teacher_server.decoding.scheduler import Generation, OnThread


ScoreJob = tuple[TokenBatch, SignalSpec]


@dataclass(frozen=True)
class ModelFacts:
    """What a loaded model says of itself; see TeacherInfo for the fields."""

    model: str
    fingerprint: str
    architecture: str
    dtype: str
    vocab_rows: int
    tokenizer_size: int
    tokenizer_sha256: str
    chat_template_sha256: str
    hidden_size: int
    layers: int
    artifacts: tuple[ArtifactInfo, ...]
    transports: tuple[str, ...]
    max_sequence_tokens: int
    generates: tuple[str, ...] = ()
    base_tokenizer_sha256: str = ""
    added_tokens: str = ""
    kv_width: int = 0
    basis_rank: int = 0
    basis_layers: tuple[int, ...] = ()


class Backend(Protocol):
    """A loaded model."""

    @property
    def facts(self) -> ModelFacts:
        """Constant while the backend lives."""

    def score(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> list[TeacherSignals]:
        """The signals of each job, from as few forward passes as fit.

        The same list of jobs gives the same bits; other company may move them within rounding.
        """

    def begin(self, jobs: list[tuple[TokenBatch, SignalSpec]]) -> Callable[[], list[TeacherSignals]]:
        """Begins what `score` does; what it returns waits for the answers.

        The next batch may be begun before, from the same thread; the wait may be in another thread.
        """

    def artifact(self, wanted: ArtifactInfo) -> Artifact:
        """One of `facts.artifacts`, copied to the host; called once for each, from any thread."""


@runtime_checkable
class EachBackend(Protocol):
    """A backend that hands out the answers of a batch one by one."""

    def begin_each(self, jobs: list[ScoreJob]) -> Callable[[], Iterator[tuple[int, TeacherSignals]]]:
        """As `begin`; what it returns gives the place of each job and its answer as soon as that one is on the host.

        Only the last one need carry the times of the batch.
        """


@runtime_checkable
class CalibratedBackend(Protocol):
    """A backend that can project states of its layers."""

    def calibrate(self, features: FeaturesConfig) -> None:
        """Calibrates what states are projected on; `facts` then list the artifact layer_basis. Called once, before any other call.

        Raises:
            ServerConfigError: the model hands no states over, has no such layer, or the sample is none.
        """


@runtime_checkable
class ReadingBackend(Protocol):
    """A backend with a tokenizer of transformers, by which its teacher answers Tokenize."""

    tokenizer: Any


class WritingBackend(Backend, Protocol):
    """A backend whose facts say that it generates."""

    def generation(self, config: GenerationConfig, on_thread: OnThread, *, deterministic: bool) -> Generation:
        """What answers Generate. `on_thread` runs a call where `score` runs; a backend with a queue of its own needs none."""


@runtime_checkable
class OutsideBackend(Protocol):
    """A backend whose model lives in processes of its own."""

    def check_health(self) -> None:
        """Raises RuntimeError if they are gone."""

    def close(self) -> None:
        """Ends them."""
