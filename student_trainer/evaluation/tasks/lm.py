"""An engine as lm-evaluation-harness asks a model.

One class for students and served teachers, in place of lm-eval's HFLM for the former: so both sides of a table have the same tokenisation of
context and continuation, the same templates (those of training), and the same rule for what is too long (refused, where HFLM cuts it on the left
with a warning). `tests/student_trainer/evaluation/test_lm.py` holds it against HFLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.errors import ConfigError, DataError
from student_trainer.evaluation.tasks.engine import Engine, Pair, tokenizer_of
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.served import Scored
from student_trainer.progress import ProgressBar

_WINDOW = 2048  # tokens of a rolling text that are read at a time by a model that knows no limit
MAX_NEW_TOKENS = 256  # where a task names no limit, as in lm-eval
_IGNORED = ("max_length",)


class EngineLM(TemplateLM):
    """See module.

    Args:
        engine: the model.
        console: where progress is shown.
    """

    def __init__(self, engine: Engine, console: Console) -> None:
        super().__init__()
        self._engine, self._console = engine, console
        self.tokenizer = tokenizer_of(engine)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the end of text where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, with the tokenizer's own BOS unless the text begins with one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as training renders it; without a generation prompt its last turn is begun, to be gone on with.

        Raises:
            DataError: the template refuses it.
        """
        if add_generation_prompt:
            turns = tuple(Turn(message["role"], message["content"]) for message in chat_history)
            return self._engine.prompter.text(Conversation(turns))
        text: str = self.tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy decoding would write it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [(one.logp, one.is_greedy) for one in self._score([(context, told) for _, context, told in requests])]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """log p of whole texts, in windows where they are longer than the model's sequences."""
        most = self._engine.max_scored or _WINDOW + 1
        pairs: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=most - 1,
                context_len=1,
            )
            some = [make_disjoint_window(window) for window in windows]
            pairs += some
            counts.append(len(some))
        scored = iter(self._score(pairs))
        return [sum(next(scored).logp for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers up to the first of each task's stop texts.

        Raises:
            ConfigError: a task asks for what is not known here.
            DataError: a prompt and its answer are longer than the model takes.
        """
        found: dict[int, str] = {}
        alike: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_asked(request.args[1], request.task_name), []).append(number)
        with ProgressBar(self._console, f"{self._engine.name} writes", len(requests)) as bar:
            ended = 0

            def done(count: int) -> None:
                nonlocal ended
                ended += count
                bar.update(ended)

            for (sampling, until), numbers in alike.items():
                prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
                self._check(max(map(len, prompts)) + sampling.max_new_tokens, f"and its answer of up to {sampling.max_new_tokens} tokens ", self._engine.max_tokens)  # fmt: skip
                for number, made in zip(numbers, self._engine.write(prompts, sampling, until, done), strict=True):
                    found[number] = _cut(made.text, until)
        return [found[number] for number in range(len(requests))]

    def _score(self, pairs: Sequence[Pair]) -> list[Scored]:
        if not pairs:
            return []
        if any(not told for _, told in pairs):
            raise DataError(
                "a continuation of the task has no token of its own: the tokenizer merges it into its context"
            )
        self._check(max(len(context) + len(told) for context, told in pairs), "", self._engine.max_scored)
        with ProgressBar(self._console, f"{self._engine.name} scores", len(pairs)) as bar:
            ended = 0

            def done(count: int) -> None:
                nonlocal ended
                ended += count
                bar.update(ended)

            return self._engine.score(pairs, done)

    def _check(self, tokens: int, more: str, most: int | None) -> None:
        if most is not None and tokens > most:
            raise DataError(
                f"a prompt of the task {more}takes {tokens:,} tokens, and {self._engine.name} takes {most:,}: lower --shots, or leave the task out"
            )


def _asked(given: dict[str, Any], task: str) -> tuple[Sampling, tuple[str, ...]]:
    """How a task wants its answers written."""
    wanted = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
    until = tuple(text for text in wanted.pop("until") if text)
    samples, temperature = wanted.pop("do_sample", False), float(wanted.pop("temperature", 0.0) or 0.0)
    most = int(wanted.pop("max_gen_toks"))
    top_p, top_k = float(wanted.pop("top_p", 1.0)), int(wanted.pop("top_k", 0))
    unknown = sorted(name for name in wanted if name not in _IGNORED or wanted[name] is not None)
    if unknown:
        raise ConfigError(f"task {task}: asks for generation by {', '.join(unknown)}, which is not known here")
    if not samples or not temperature:
        return Sampling(max_new_tokens=most), until
    return Sampling(temperature, top_p, max(0, top_k), most), until


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
