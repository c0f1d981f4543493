from __future__ import annotations

import pytest

from student_trainer.data.dataset import encode
from student_trainer.data.formats import Conversation, Turn
from student_trainer.data.templates import TEMPLATES, choose, prompt_segments
from student_trainer.errors import DataError
from tests.student_trainer.data.tiny_tokenizers import tokenizer

CONTENTS = [
    "    return a + b",  # would merge with the newline of the header
    "\n\n\n",
    "你好,世界。 😀👍🏽 naïve café",
    "one\r\ntwo\r\n",
    " ",
    "<|im_en",
    "assistant\n",
]


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in turns))


def supervised_text(family: str, template: str, talk: Conversation) -> list[str]:
    """The decoded runs of supervised tokens."""
    tok = tokenizer(family)
    [(ids, mask)] = encode([choose(template, tok)(talk, tok)], tok)
    runs, run = [], []
    for token, wanted in zip([*ids.tolist(), -1], [*mask.tolist(), False], strict=True):
        if wanted:
            run.append(token)
        elif run:
            runs.append(tok.decode(run, clean_up_tokenization_spaces=False))
            run = []
    return runs


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("family", "end"), [("chatml", "<|im_end|>"), ("glm", "<|endoftext|>"), ("plain", "</s>")])
def test_mask_covers_exactly_content_and_end_of_turn(family: str, end: str, content: str) -> None:
    talk = conversation(("user", "Complete.\n def f():\n"), ("assistant", content))
    assert supervised_text(family, "auto", talk) == [content + end]


def test_every_assistant_turn_is_supervised_and_nothing_else() -> None:
    talk = conversation(("system", "S"), ("user", "a"), ("assistant", "    b😀"), ("user", "c"), ("assistant", "d\r\n"))
    assert supervised_text("chatml", "chat", talk) == ["    b😀<|im_end|>", "d\r\n<|im_end|>"]
    assert supervised_text("plain", "plain", talk) == ["    b😀</s>", "d\r\n</s>"]
    assert supervised_text("llama", "chat", talk) == ["b😀<|eot_id|>", "d<|eot_id|>"]  # its template trims
    assert supervised_text("glm", "chat", talk) == ["    b😀", "d\r\n<|endoftext|>"]  # the next header ends the first


@pytest.mark.parametrize("family", ["chatml", "llama", "glm"])
@pytest.mark.parametrize("content", CONTENTS[:4])
def test_training_prompt_equals_inference_prompt(family: str, content: str) -> None:
    tok = tokenizer(family)
    talk = conversation(("system", "S"), ("user", "Complete.\n"), ("assistant", content))
    [(ids, mask)] = encode([choose("chat", tok)(talk, tok)], tok)
    messages = [{"role": t.role, "content": t.content} for t in talk.turns[:-1]]
    inference = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert ids[~mask].tolist() == inference == ids[: len(inference)].tolist()
    [(prompt, _)] = encode([prompt_segments(talk, tok, choose("chat", tok))], tok)
    assert prompt.tolist() == inference


def test_whole_text_tokenisation_would_differ() -> None:
    """The reason for segments: a merge across the border changes the prompt's last token."""
    tok = tokenizer("chatml")
    talk = conversation(("user", "x"), ("assistant", "    return None"))
    segments = choose("chat", tok)(talk, tok)
    [(ids, _)] = encode([segments], tok)
    assert ids.tolist() != tok("".join(s.text for s in segments), add_special_tokens=False)["input_ids"]


def test_whitespace_after_the_end_of_turn_is_not_supervised() -> None:
    tok = tokenizer("chatml")
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    segments = choose("chat", tok)(talk, tok)
    assert [s.text for s in segments] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b<|im_end|>",
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        "d<|im_end|>",
    ]
    assert [s.content_bytes for s in segments] == [0, 1, 0, 1]


@pytest.mark.parametrize(("family", "template"), [("llama", "chat"), ("llama", "plain"), ("plain_bos", "auto")])
def test_exactly_one_bos(family: str, template: str) -> None:
    tok = tokenizer(family)
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    [(ids, mask)] = encode([choose(template, tok)(talk, tok)], tok)
    assert ids[0] == tok.bos_token_id and (ids == tok.bos_token_id).sum() == 1 and not mask[0]


def test_plain_prompt_is_the_turns_and_newlines() -> None:
    tok = tokenizer("plain")
    segments = choose("auto", tok)(conversation(("user", "Add.\n1 2"), ("assistant", "3")), tok)
    assert [s.text for s in segments] == ["Add.\n1 2\n", "3</s>"]


def test_templates_that_break_the_rules_are_refused() -> None:
    talk = conversation(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match="rewrites earlier text when turn 1"):
        choose("chat", tokenizer("rewriting"))(talk, tokenizer("rewriting"))
    with pytest.raises(DataError, match="does not show the content of turn 1"):
        choose("chat", tokenizer("silent"))(conversation(("user", "a"), ("assistant", "zz")), tokenizer("silent"))


def test_choice_of_template() -> None:
    assert choose("auto", tokenizer("chatml")) is TEMPLATES["chat"]
    assert choose("auto", tokenizer("plain")) is TEMPLATES["plain"]
    with pytest.raises(DataError, match="no chat template"):
        choose("chat", tokenizer("plain"))
    with pytest.raises(DataError, match="known: auto, chat, plain"):
        choose("alpaca", tokenizer("plain"))
