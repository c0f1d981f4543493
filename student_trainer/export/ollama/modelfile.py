"""The Modelfile of a GGUF file: FROM, TEMPLATE, and as PARAMETERs what ends an answer and how answers are sampled.

In: the tokenizer's chat template, the generation config, and what the GGUF file says of its own tokenizer; out: text for `ollama create`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.text.clock import Clock
from student_trainer.data.text.templates import choose
from student_trainer.errors import ModelError
from student_trainer.export.ollama.translation import Message, Translated, translate

_ANSWER = "Lyceumanswer"
# generation_config.json -> Modelfile
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Modelfile:
    """The file and what should be known of it."""

    text: str
    stops: tuple[str, ...]
    translated: Translated


def make_modelfile(
    tokenizer: Any,
    generation: Mapping[str, Any],
    gguf_file: str,
    *,
    adds_bos: bool,
    context: int | None,
    name: str,
    template: str = "chat",
    kwargs: Mapping[str, Any] | None = None,
) -> Modelfile:
    """The Modelfile.

    Args:
        tokenizer: the student's, with its chat template.
        generation: the object of generation_config.json; empty if there is none.
        gguf_file: its name beside the Modelfile.
        adds_bos: whether llama.cpp puts the BOS token in front of every prompt (tokenizer.ggml.add_bos_token).
        context: positions of the student; None: as Ollama likes.
        name: of the model, for errors.
        template, kwargs: the chat template that the student was trained with, and its variables.

    Raises:
        ModelError: a chat template that cannot be translated, or nothing that ends an answer.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name}: its tokenizer has no chat template, so there is no TEMPLATE for a Modelfile; use --format gguf"
        )
    clock = Clock()
    chosen = choose(template, tokenizer, kwargs=kwargs, clock=clock)

    def jinja(messages: Sequence[Message]) -> str:
        turns = tuple(Turn(message["role"], message["content"]) for message in messages)
        return chosen.prompt(Conversation(turns))[0]

    translated = translate(jinja, name, bos=str(tokenizer.bos_token or "") if adds_bos else "")
    if clock.asked:
        raise ModelError(
            f"{name}: its chat template prints the day (strftime_now), and a Modelfile would print {clock.day} for ever; use --format gguf and "
            "render the prompts yourself"
        )
    stops = stop_texts(tokenizer, generation)
    if not stops:
        raise ModelError(
            f"{name}: neither its tokenizer nor its generation config says what ends an answer (eos_token), so Ollama would never stop"
        )
    if '"""' in translated.source:
        raise ModelError(f'{name}: its chat template holds """, which a Modelfile cannot hold')
    lines = [f"FROM ./{gguf_file}", f'TEMPLATE """{translated.source}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {key} {value:g}" for key, value in sampling(generation).items()]
    lines += [f"PARAMETER num_ctx {context}"] if context is not None else []
    return Modelfile("\n".join(lines) + "\n", stops, translated)


def stop_ids(tokenizer: Any, generation: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer: the tokenizer's eos, those of the generation config, and what the chat template writes behind one."""
    configured = generation.get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    if tokenizer.chat_template:
        [answer] = choose("chat", tokenizer).answers(
            Conversation((Turn("user", "a"), Turn("assistant", _ANSWER))), "last"
        )
        written = (answer.target + answer.ending).rpartition(_ANSWER)[2]  # before it may stand an empty <think> part
        ids += [
            number for number, token in tokenizer.added_tokens_decoder.items() if written.startswith(str(token.content))
        ]
    return list(dict.fromkeys(int(number) for number in ids if number is not None))


def stop_texts(tokenizer: Any, generation: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of `stop_ids`."""
    return tuple(str(text) for text in tokenizer.convert_ids_to_tokens(stop_ids(tokenizer, generation)) if text)


def sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """How answers are sampled, in Ollama's words; a model that does not sample has temperature 0."""
    if not generation.get("do_sample", False):
        return {"temperature": 0.0} if "do_sample" in generation else {}
    return {
        theirs: float(generation[ours])
        for ours, theirs in _SAMPLING.items()
        if isinstance(generation.get(ours), int | float)
    }


def read_generation(folder: Path) -> dict[str, Any]:
    """The object in generation_config.json, or nothing."""
    file = folder / "generation_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
