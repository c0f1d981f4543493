"""What the fields of a row mean beyond its text: those that may not be dropped, and rows that are for other trainers.

In: fields; out: why they are refused, in words. Parses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from student_trainer.data.rows.messages import is_empty

_TEXT_ALONE = "rows of text alone can be learned from"
_ELSEWHERE = "changes the meaning of the row, and this format has no place for it"
# Fields that change what a row means. Where the format does not use one that is not empty, the row is refused by its name.
# Every other field that is not used is told once for each source ("not used: id, source").
MEANING: dict[str, str] = {
    **dict.fromkeys((
        "image", "images", "image_url", "image_path", "image_file", "audio", "audios", "audio_path", "video", "videos", "video_path",
        "objects", "bbox", "pixel_values", "mm_inputs", "files", "attachments",
    ), _TEXT_ALONE),
    **dict.fromkeys((
        "tools", "functions", "tool_calls", "function_call", "system", "system_prompt", "developer", "history", "input", "context",
        "documents", "prefix", "suffix", "weight", "chat_template_kwargs", "reasoning_content", "thinking", "reasoning",
    ), _ELSEWHERE),
    **dict.fromkeys(
        ("weights", "loss", "loss_scale", "loss_weight", "train", "train_on_turn", "mask", "masked", "loss_mask"),
        "decides what of the row is learned, and is known of messages alone; of a row there is `weight`",
    ),
    **dict.fromkeys(("enable_thinking", "add_generation_prompt"), "variables of the chat template stand in chat_template_kwargs"),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "margin"), "belongs to preference learning"),
    **dict.fromkeys(("input_ids", "token_ids", "labels", "attention_mask"), "belongs to rows that are tokenised already"),
    "kto_tag": "belongs to preference learning", "reward_model": "belongs to reinforcement learning",
}  # fmt: skip


def why_refused(field: str, value: object) -> str:
    """Why a field that is not used changes the meaning, or "" where it does not."""
    if known := MEANING.get(field.lower()):
        return known
    if field == "label" and isinstance(value, bool):
        return "true and false as a label belong to preference learning"
    return _TEXT_ALONE if _is_binary(value) else ""


def _is_binary(value: object) -> bool:
    """Whether a value is bytes, an image or sound as `datasets` stores it ({bytes, path}), or a list of these."""
    if isinstance(value, list):
        return any(_is_binary(item) for item in value)
    return isinstance(value.get("bytes") if isinstance(value, Mapping) else value, bytes)


def is_preference(fields: Mapping[str, Any]) -> bool:
    """Whether a row has a better and a worse answer."""
    return not is_empty(fields.get("chosen")) and not is_empty(fields.get("rejected"))


def not_learned_here(fields: Mapping[str, Any]) -> str:
    """What a row that fits no format is, where it is known and its answers cannot be told, else ""."""
    given = {name for name, value in fields.items() if not is_empty(value)}
    if is_preference(fields):
        return (
            "a preference row (chosen, rejected), and this trainer learns from answers; to learn the chosen ones: "
            "columns: {chosen: completion, rejected: null}, or {chosen: messages, ...} where they are whole conversations"
        )
    if {"input_ids", "token_ids"} & given:
        return "a tokenised row, and this trainer tokenises rows itself; give the text it was made of"
    if "text" in given:
        return "a row of plain text, which does not say what of it is the answer to be learned; split it into prompt and completion"
    return ""
