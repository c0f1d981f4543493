"""Real tokenizers and chat templates: prompts are inference's, targets are the assistant's words, segmentation is the whole text's.

LYCEUM_REAL names the folder that ../shared/real/get.sh fills; without it nothing here runs.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from student_trainer.data.rows.formats import Conversation
from student_trainer.data.text.encoding import Encoder
from student_trainer.data.text.templates import choose
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import DataError
from tests.real.conversations import CONVERSATIONS

REAL = os.environ.get("LYCEUM_REAL", "")
if not REAL or not Path(REAL).is_dir():
    pytest.skip("LYCEUM_REAL names no folder of real models (../shared/real/get.sh)", allow_module_level=True)

FOLDERS = {
    "smollm2": "smollm2",
    **{name: f"tokenizers/{name}" for name in ("qwen3", "llama3_1", "gemma3", "deepseek_v3")},
}
# What a template does not show is refused by name, and by which words; everything else must work.
REFUSED = {
    "smollm2": {"tool": "tool", "tools": "tool", "reasoning beside": "reasoning", "no thinking": "enable_thinking"},
    "llama3_1": {"tool": "tool", "tools": "tool", "reasoning beside": "reasoning", "no thinking": "enable_thinking"},
    "gemma3": {"tool": "tool", "tools": "tool", "reasoning beside": "reasoning", "no thinking": "enable_thinking"},
    "deepseek_v3": {"tools on offer": "tools", "reasoning beside": "reasoning", "no thinking": "enable_thinking", "tool": "tools"},
    "qwen3": {},
}  # fmt: skip
# Answers that begin with spaces: GPT-2's pattern makes one piece of the header's newline and all spaces but the last. The prompt's ids
# stand. The other tokenizers cut behind newlines.
BORDER_MERGES = {"smollm2": 4, "qwen3": 0, "llama3_1": 0, "gemma3": 0, "deepseek_v3": 0}


@cache
def real(name: str):
    return load_tokenizer(Path(REAL) / FOLDERS[name])


def refusal(name: str, kind: str) -> str:
    return next((said for prefix, said in REFUSED[name].items() if kind == prefix or kind.startswith(prefix + " ")), "")


def answer_text(name: str, talk: Conversation, turn: int) -> str:
    """The assistant's words as the template lays them out, written down here by hand, with the end of turn."""
    said = talk.turns[turn]
    end = {"smollm2": "<|im_end|>", "qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>", "deepseek_v3": "<｜end▁of▁sentence｜>"}[name]  # fmt: skip
    content = said.content
    if name == "qwen3":
        reasoning = said.extra.get("reasoning_content", "")
        if "</think>" in content:
            reasoning, _, content = content.removeprefix("<think>").partition("</think>")
        content = content.lstrip("\n")
        calls = "".join(
            f'<tool_call>\n{{"name": "get_weather", "arguments": {{"town": "{call["function"]["arguments"]["town"]}"}}}}\n</tool_call>'
            for call in said.extra.get("tool_calls", ())
        )
        closed = talk.template_kwargs.get("enable_thinking") is False
        content = ("" if closed else f"<think>\n{reasoning.strip(chr(10))}\n</think>\n\n") + content + calls
    if name in ("llama3_1", "gemma3"):
        content = content.strip()
    return content + end


@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_targets_and_segmentation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(CONVERSATIONS) == 40
    tok = real(name)
    counted: Counter[str] = Counter()
    for kind, talk in CONVERSATIONS.items():
        template = choose("chat", tok)
        encoder = Encoder(tok, template)
        if said := refusal(name, kind):
            with pytest.raises(DataError, match=said):
                template.answers(talk)
            counted["refused by name"] += 1
            continue
        answers = template.answers(talk)
        [found] = encoder.encode([answers])
        literal = answers[0].literal
        counted["conversations"] += 1
        counted["parted"] += encoder.parted
        counted["literal"] += literal
        counted["border merges"] += encoder.border_merges
        if encoder.border_merges:
            starts = [answer.target[0] for answer in answers]
            assert encoder.border_merges == sum(start in " \t\n" for start in starts), kind
        for sequence in found:
            ids, mask = sequence.token_ids.tolist(), sequence.loss_mask
            runs = _runs(ids, mask)
            assert [tok.decode(run, clean_up_tokenization_spaces=False) for run in runs] == [
                _normal(tok, answer_text(name, talk, turn)) for turn in sequence.turns
            ], kind
            for turn in sequence.turns:
                counted["answers"] += 1
                prompt = _inference(tok, talk, turn)
                if literal:
                    assert _decoded(tok, ids[: int(mask.argmax())]) == _decoded(tok, prompt), kind
                    assert ids.count(tok.eos_token_id) < prompt.count(tok.eos_token_id) + 1, kind
                    continue
                assert ids[: len(prompt)] == prompt and mask[len(prompt)] and not mask[: len(prompt)][-1], kind
            last = next(answer for answer in answers if answer.turn == sequence.turns[-1])
            whole = tok(last.prompt + last.target + last.ending, add_special_tokens=False)["input_ids"]
            if not literal and whole != ids:
                counted["segmented otherwise than the whole text"] += 1
    with capsys.disabled():
        print(f"\n{name}: {dict(counted)}")
    assert counted["segmented otherwise than the whole text"] <= counted["border merges"]
    assert counted["border merges"] == BORDER_MERGES[name], "answers that begin with spaces"


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_what_is_taken_from_the_whole_text_is_what_the_prompt_alone_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = choose("chat", real(name))
    answers = [template.answers(talk) for kind, talk in CONVERSATIONS.items() if not refusal(name, kind)]
    quick = Encoder(real(name), template).encode(answers)
    monkeypatch.setattr(Encoder, "_last_cut", lambda self, text: None)
    for mine, slow in zip(quick, Encoder(real(name), template).encode(answers), strict=True):
        assert [one.token_ids.tolist() for one in mine] == [one.token_ids.tolist() for one in slow]
        assert [one.loss_mask.tolist() for one in mine] == [one.loss_mask.tolist() for one in slow]


def _runs(ids: list[int], mask) -> list[list[int]]:
    runs: list[list[int]] = []
    for i, wanted in enumerate(mask):
        if wanted and (i == 0 or not mask[i - 1]):
            runs.append([])
        if wanted:
            runs[-1].append(ids[i])
    return runs


def _inference(tok, talk: Conversation, turn: int) -> list[int]:
    messages = [one.message for one in talk.turns[:turn]]
    return tok.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, tools=list(talk.tools) or None, **talk.template_kwargs
    )["input_ids"]


def _decoded(tok, ids: list[int]) -> str:
    return tok.decode(ids, clean_up_tokenization_spaces=False)


def _normal(tok, text: str) -> str:
    """A text as the tokenizer's own normalizer leaves it (NFC)."""
    normalizer = tok.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer is not None and "NFC" in repr(normalizer) else text
