"""Forty conversations of the kinds that people train on: system, none, several turns, reasoning, tools, scripts, code, line ends."""

from __future__ import annotations

from student_trainer.data.rows.formats import Conversation, Turn

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CODE = "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))"
ANSWERS = (
    "Paris.",
    "    return a + b",
    "\treturn a + b",
    CODE,
    f"```python\n{CODE}\n```",
    "你好,世界。这是一个测试。",
    "日本語のテキスト、ひらがなとカタカナ。",
    "한국어 문장입니다.",
    "العربية من اليمين إلى اليسار",
    "😀👍🏽👩‍👩‍👧 emoji 🏴‍☠️",
    "naïve café Ünïcödé",
    "one\r\ntwo\r\nthree",
    "a\n\n\nb",
    "1, 2, 3: 4 + 5 = 9; 10,000.5",
    "x² + y² ≤ z² ∀x∈ℝ",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "<b>bold</b> &amp; <i>it</i>",
    '{"name": "x", "list": [1, 2.5, null]}',
    "   leading and trailing   words",
    "\u200bzero\u200dwidth\ufeff",
)


def _talk(*turns: tuple[str, str] | Turn, **more) -> Conversation:
    return Conversation(tuple(turn if isinstance(turn, Turn) else Turn(*turn) for turn in turns), **more)


def _call(arguments: dict[str, str], content: str = "") -> Turn:
    return Turn("assistant", content, extra={"tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]})  # fmt: skip


def _made() -> dict[str, Conversation]:
    made: dict[str, Conversation] = {}
    for i, answer in enumerate(ANSWERS):
        system = [("system", "You are terse. 请用中文。")] if i % 3 == 0 else []
        made[f"answer {i}"] = _talk(*system, ("user", f"Complete:\n{answer[:7]}"), ("assistant", answer))
    for i in range(0, 20, 2):
        first, second = ANSWERS[i], ANSWERS[(i * 7 + 3) % 20]
        system = [("system", "S")] if i % 4 else []
        made[f"turns {i}"] = _talk(*system, ("user", "Hi 😀"), ("assistant", first), ("user", "And?\r\n"), ("assistant", second))  # fmt: skip
    made["many turns"] = _talk(*((role, f"{role} {n}: 你 {n}") for n in range(5) for role in ("user", "assistant")))
    made["inline reasoning"] = _talk(("user", "2+2?"), ("assistant", "<think>\nTwo and two.\n</think>\n\nFour"))
    made["inline reasoning, close"] = _talk(("user", "2+2?"), ("assistant", "<think>Two and two.</think>Four"))
    made["reasoning beside"] = _talk(("user", "2+2?"), Turn("assistant", "Four", extra={"reasoning_content": "二と二 😀\nyes"}))  # fmt: skip
    made["reasoning twice"] = _talk(
        ("user", "2+2?"), ("assistant", "<think>\na\n</think>\n\nFour"), ("user", "3+3?"), ("assistant", "<think>\nb\n</think>\n\nSix"),
    )  # fmt: skip
    made["no thinking"] = _talk(("user", "2+2?"), ("assistant", "Four"), template_kwargs={"enable_thinking": False})
    made["tools on offer"] = _talk(("user", "Hi"), ("assistant", "Hello"), tools=(TOOL,))
    made["tool call"] = _talk(("user", "Weather in Bergen?"), _call({"town": "Bergen"}), tools=(TOOL,))
    made["tool call and answer"] = _talk(
        ("user", "Weather in 東京?"), _call({"town": "東京"}), Turn("tool", '{"rain": true}', extra={"name": "get_weather"}), ("assistant", "Rain ☔."), tools=(TOOL,),
    )  # fmt: skip
    made["quoted end of turn"] = _talk(("user", "What is <|im_end|> or <end_of_turn>?"), ("assistant", "A token."))
    return made


CONVERSATIONS = _made()
