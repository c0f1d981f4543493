"""A run's numbers as the memory estimate takes them: its largest micro-batch, its labels and heads, and how its passes are computed.

In: a config, the rows and the sessions; out: a `Step` and an `Estimate`, for this machine's device or for a card that is only named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import answer_bytes, order_of
from student_trainer.errors import ConfigError
from student_trainer.model.load import Outline
from student_trainer.model.precision import multiplies_bfloat16
from student_trainer.model.speed.cuda_graphs import padded_length
from student_trainer.planning.estimate.parts import Estimate, Step, estimate
from student_trainer.planning.estimate.shapes import Shapes, load_shapes
from student_trainer.teachers.session import TeacherSession

_BATCHES_READ = 20_000  # micro-batches that are looked at for the largest
_UNITS = {"": 30, "g": 30, "gb": 30, "gib": 30, "m": 20, "mb": 20, "mib": 20}


def parse_size(text: str, option: str) -> int:
    """Bytes of "24GiB", "24G" or "24"; a card's GB are GiB, as its maker counts them.

    Raises:
        ConfigError: it is no such text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"{option} {text!r}: is no size above 0 such as 24GiB")
    return round(float(found[1]) * (1 << _UNITS[found[2].lower()]))


@dataclass(frozen=True)
class Card:
    """Where the student is to be trained.

    Attributes:
        name: for people.
        bytes: its memory.
        is_gpu: whether layers are compiled, passes recorded and losses computed by kernels there.
    """

    name: str
    bytes: int
    is_gpu: bool

    @classmethod
    def of(cls, named: str | None, budget: str | None) -> Card:
        """A named card, that which a budget means, or this machine's."""
        if named is not None:
            return cls(f"a card of {named}", parse_size(named, "--card"), True)
        if torch.cuda.is_available():
            return cls(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], True)
        if budget is not None:
            return cls(f"a card of {budget}", parse_size(budget, "--budget"), True)
        import psutil

        return cls("this machine's memory (no GPU here)", psutil.virtual_memory().total, False)


@dataclass
class Memory:
    """Estimates of a run and of others like it; models that are alike are traced once.

    Attributes:
        card: where.
    """

    config: TrainConfig
    outline: Outline
    data: TokenizedDataset
    sessions: Sequence[TeacherSession]
    card: Card
    _shapes: dict[str, Shapes] = field(default_factory=dict)

    def shapes(self, model: ModelConfig, *, autocast: bool) -> Shapes:
        """Of a student."""
        keys = {"path", "revision", "dtype", "attention", "lora", "quantize"}
        key = model.model_dump_json(include=keys & set(type(model).model_fields))
        if key not in self._shapes:
            bfloat16 = (
                True if self.card.is_gpu and not torch.cuda.is_available() else multiplies_bfloat16(self.card.is_gpu)
            )
            self._shapes[key] = load_shapes(model, bfloat16=bfloat16, autocast=autocast)
        return self._shapes[key]

    def of(self, config: TrainConfig) -> Estimate:
        """The estimate of a run that differs from `self.config` in `model`, `train` or `loss.chunk_mb`.

        Raises:
            ModelError: as `load_shapes` and `Shapes.activations`.
        """
        shapes = self.shapes(config.model, autocast=config.train.bf16)
        return estimate(shapes, self.step(config, shapes), on_gpu=self.card.is_gpu)

    def step(self, config: TrainConfig, shapes: Shapes) -> Step:
        """The numbers of its largest step."""
        model, train = config.model, config.train
        compiled = model.compiled is True or (model.compiled == "auto" and self.card.is_gpu)
        draws = model.lora is not None and model.lora.dropout > 0
        graphs = bool(model.graphs) and compiled and self.card.is_gpu and not draws
        longest, rows, labels = self._largest(config)
        own = [session.vocab_rows for session in self.sessions if session.bridge is None]
        vocab = min([shapes.head_rows, len(self.outline.tokenizer), *own])
        exact = [s for s in self.sessions if {"hidden", "full"} & set(s.spec.kinds)]
        learns = config.loss.output is not None
        heads = sum(
            s.vocab_rows * s.info.hidden_size * s.info.value_bytes
            for s in self.sessions
            if "hidden" in (*s.spec.kinds, *(s.measuring.kinds if s.measuring else ()))
        )
        length = padded_length(longest) if graphs else longest
        return Step(
            sequences=train.batch_size, length=length, rows=rows, accumulation=train.accumulation,
            checkpointing=model.gradient_checkpointing, compiled=compiled, graphs=graphs,
            fused=self.card.is_gpu and (config.loss.output is None or config.loss.output.divergence != "adaptive_kl"),
            vocab_rows=vocab, chunk_bytes=config.loss.chunk_mb << 20, teacher_logits=len(exact) if learns else 0,
            class_bytes=max([_class_bytes(s, vocab) for s in self.sessions if s.bridge is not None], default=0) if learns else 0,
            teacher_heads_bytes=heads, label_bytes=labels if learns else 0,
            **self._features(config, shapes, train.batch_size * length, rows, graphs),
        )  # fmt: skip

    def _largest(self, config: TrainConfig) -> tuple[int, int, int]:
        """Tokens of the longest sequence, most supervised rows of a micro-batch, and bytes of the labels about those."""
        order = order_of(config, self.data)
        sizes = [row.example.token_ids.size for row in self.data]
        targets = [int(row.example.loss_mask.sum()) for row in self.data]
        longest = rows = most = 0
        for number in range(min(order.batches, _BATCHES_READ)):
            batch = order.batch(number)
            longest = max(longest, max(sizes[index] for index in batch))
            if (here := sum(targets[index] for index in batch)) > rows:
                rows, most = here, number
        examples = [self.data[index].example for index in order.batch(most)]
        labels = sum(
            answer_bytes(session.info, session.spec, session.reading.view(example))
            for session in self.sessions
            for example in examples
            if session.responsible(example)
        )
        return longest, rows, labels

    def _features(self, config: TrainConfig, shapes: Shapes, tokens: int, rows: int, graphs: bool) -> dict[str, int]:
        """Numbers of projectors, and bytes of tapped states, their gradients and what projectors make of them."""
        projectors = held = 0
        for session in self.sessions:
            plan = session.features
            if plan is None:
                continue
            blocks = {pair.student for pairs in plan.pairs.values() for pair in pairs}
            held += len(blocks) * tokens * shapes.width * shapes.computed_bytes * (2 if graphs else 1)
            signal = plan.signals.get("hidden")
            section = config.loss.hidden
            if signal is None or section is None:
                continue
            target = getattr(signal, "rank", 0) or plan.teacher_width
            if section.objective.startswith("proj"):
                projectors += len(plan.pairs["hidden"]) * shapes.width * target
            held += 3 * 4 * rows * target  # one pair at a time: projected, target and gradient, in float32
        return {"projectors": projectors, "feature_bytes": held}


def _class_bytes(session: TeacherSession, vocab_rows: int) -> int:
    """Bytes of a row's figures over classes, of which there are no more than ids on the smaller side: both sides' sums and a gradient.

    And of what the teacher's logits over its own ids take beyond those over the student's.
    """
    classes, is_whole = min(vocab_rows, session.vocab_rows), bool({"hidden", "full"} & set(session.spec.kinds))
    return 4 * ((3 if is_whole else 2) * classes + (max(0, session.vocab_rows - vocab_rows) if is_whole else 0))
