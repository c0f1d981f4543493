"""A student that writes: one answer as a stream of tokens, or many at a time, by transformers' `generate`.

In: prompts as ids; out: answers with their tokens and how they ended.
Axes: B prompts of a batch, L tokens of the longest.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from student_trainer.errors import ConfigError, ModelError
from student_trainer.inference.prompts import Prompter, stop_ids
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.text_stream import decoded
from student_trainer.model.load import Student

Finish = Literal["stop", "length", "stopped"]


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        text: without special tokens.
        ids: of its tokens, the one that ended it included.
        tokens: of the answer alone, without the one that ended it.
        finish: `stop` by itself, `length` at the limit of new tokens, `stopped` by the user.
    """

    text: str
    ids: tuple[int, ...]
    tokens: int
    finish: Finish


def written(tokenizer: Any, ids: Sequence[int], ends: frozenset[int], *, stopped: bool = False) -> Written:
    """An answer from its ids, cut behind the first that ends it.

    Args:
        tokenizer: whose ids.
        ids: that were written, padding behind them.
        ends: ids that end an answer.
        stopped: the user ended it.
    """
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = list(ids if end is None else ids[: end + 1])
    body = kept if end is None else kept[:-1]
    finish: Finish = "stop" if end is not None else "stopped" if stopped else "length"
    return Written(decoded(tokenizer, body), tuple(kept), len(body), finish)


class StudentWriter:
    """A student's answers.

    The sampling of generation_config.json is not used, since answers of several models are compared at equal settings; its stop ids are.

    Args:
        student: loaded by `inference.load`.
        prompter: of its prompts, for what ends an answer.
    """

    def __init__(self, student: Student, prompter: Prompter) -> None:
        self.student = student
        self.tokenizer = student.tokenizer
        self.stop_ids = stop_ids(student.causal_lm, prompter)
        student.causal_lm.generation_config = GenerationConfig()  # else its penalties would be merged into ours
        self.positions = student.outline.positions

    def check_room(self, tokens: int, max_new_tokens: int, source: str = "") -> None:
        """
        Raises:
            ConfigError: a prompt of `tokens` tokens and its answer do not fit into the positions that the model knows.
        """
        if self.positions is not None and tokens + max_new_tokens > self.positions:
            raise ConfigError(
                f"{source and f'{source}: '}a prompt of {tokens:,} tokens and --max-new-tokens {max_new_tokens:,} are more than the {self.positions:,} positions of the "
                "model: shorten the prompt, or lower --max-new-tokens"
            )

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, number: int = 0) -> Iterator[int]:
        """The tokens of one answer as they are written, the one that ends it included; closing the iterator stops the writing.

        Raises:
            ConfigError: as `check_room`.
            ModelError: out of memory.
        """
        self.check_room(len(prompt_ids), sampling.max_new_tokens)
        tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def work() -> None:
            try:
                self._generate([prompt_ids], sampling, [number], streamer=_Handing(tokens), stop=stopped.is_set)
                tokens.put(None)
            except BaseException as error:  # raised again in the thread that reads
                tokens.put(error)

        thread = threading.Thread(target=work, name="writing", daemon=True)
        thread.start()
        try:
            while (token := tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            stopped.set()
            thread.join()

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
        *,
        until: Sequence[str] = (),
        ignore_ends: bool = False,
    ) -> list[Written]:
        """An answer to each prompt, all in one batch.

        Args:
            prompts: ids.
            sampling: how.
            numbers: of the answers, by which their random streams are chosen; by default their places.
            until: texts at which an answer need not go on; they are left in it.
            ignore_ends: write all of max_new_tokens.

        Raises:
            ConfigError: as `check_room`.
            ModelError: out of memory.
        """
        for prompt in prompts:
            self.check_room(len(prompt), sampling.max_new_tokens)
        ends = frozenset() if ignore_ends else self.stop_ids
        rows = self._generate(prompts, sampling, numbers or range(len(prompts)), until=until, ends=ends)
        return [written(self.tokenizer, row, ends) for row in rows]

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int],
        *,
        streamer: Any = None,
        stop: Callable[[], bool] | None = None,
        until: Sequence[str] = (),
        ends: frozenset[int] | None = None,
    ) -> list[list[int]]:
        """The new ids of each prompt; behind its end a row is padded."""
        longest, device = max(map(len, prompts)), self.student.outline.device
        ids_BL = torch.full((len(prompts), longest), self.student.pad_id, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask_BL[row, longest - len(prompt) :] = 1
        stops: list[StoppingCriteria] = [] if stop is None else [_WhenTold(stop)]
        if until:
            stops.append(_AtTexts(self.tokenizer, until, longest))
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.stop_ids if ends is None else ends) or None,
            pad_token_id=self.student.pad_id,
        )
        try:
            with self.student.computing():
                made = self.student.causal_lm.generate(
                    input_ids=ids_BL.to(device),
                    attention_mask=mask_BL.to(device),
                    generation_config=settings,
                    logits_processor=sampling.processors(numbers),
                    stopping_criteria=StoppingCriteriaList(stops),
                    streamer=streamer,
                )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory while writing {len(prompts)} answers of up to {sampling.max_new_tokens} tokens: lower --batch-size or --max-new-tokens"
            ) from error
        rows: list[list[int]] = made[:, longest:].tolist()
        return rows


class _Handing:
    """A streamer that hands on tokens; transformers puts the prompt first."""

    def __init__(self, tokens: queue.Queue[Any]) -> None:
        self._tokens = tokens
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._tokens.put(token)

    def end(self) -> None:
        """Nothing: the thread says when all is written."""


class _WhenTold(StoppingCriteria):
    """Ends all answers when somebody says so."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)


class _AtTexts(StoppingCriteria):
    """Ends an answer when one of some texts stands in it; looks at the last tokens, which is where a new one appears."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._texts, self._start = tokenizer, texts, prompt_tokens
        self._looked = 16 + max(len(text.encode()) for text in texts)  # no token is shorter than a byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._looked) :].tolist()
        texts = [decoded(self._tokenizer, tail) for tail in tails]
        found = [any(text in tail for text in self._texts) for tail in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)
