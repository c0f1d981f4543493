"""What a model can read: the ids it has embeddings for and the positions it knows, held against the rows of a run.

In: a student's outline and tokenised rows; out: nothing, or a refusal before step 0 that names setting, row and limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from student_trainer.data.dataset import TokenizedDataset
from student_trainer.errors import DataError, ModelError

if TYPE_CHECKING:
    from student_trainer.model.load import Outline

# Architectures that have the setting and no positions: state space models, and attention with linear biases or none.
_WITHOUT_POSITIONS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "bloom", "jamba")


def position_limit(config: Any) -> int | None:
    """The longest sequence that a text config has positions for, rope scaling counted in; None if there is no limit."""
    own = getattr(config, "max_position_embeddings", None)
    if config.model_type in _WITHOUT_POSITIONS or getattr(config, "alibi", False):
        return None
    if not isinstance(own, int) or own <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = (
        [rope]
        if "rope_type" in rope or "factor" in rope
        else [part for part in rope.values() if isinstance(part, dict)]
    )
    limits = [own]
    for kind in kinds:
        factor = kind.get("factor")
        if (
            factor and kind.get("rope_type", "default") != "default"
        ):  # some files give the limit after scaling, some before
            limits.append(int(float(factor) * (kind.get("original_max_position_embeddings") or own)))
    return max(limits)


def check_data(student: Outline, path: str, data: TokenizedDataset, held_out: TokenizedDataset | None) -> None:
    """Refuses rows with ids or lengths that the model does not know.

    Args:
        student: who is to read them.
        path: model.path, for messages.
        data, held_out: the run's rows.

    Raises:
        ModelError: the tokenizer's ids, that of padding among them, go beyond the model's embedding or head.
        DataError: a row is longer than the model's positions.
    """
    rows = min(student.embedding_rows, student.vocab_rows)
    tokenizer = student.tokenizer
    for setting, examples in (("data.train", data), ("data.eval", held_out or ())):
        for _, example in ((row.index, row.example) for row in examples):
            if example.token_ids.size and int(example.token_ids.max()) >= rows:
                token_id = int(example.token_ids[np.argmax(example.token_ids >= rows)])
                raise ModelError(
                    f"model.path {path}: {setting} {example.key} has token {_shown(tokenizer, token_id)}, and the model has "
                    f"{rows} rows, ids 0 to {rows - 1}: its tokenizer has tokens that its weights lack; resize the model's embeddings "
                    "(resize_token_embeddings) or use the tokenizer that it was made with"
                )
            if student.positions is not None and example.token_ids.size > student.positions:
                raise DataError(
                    f"{setting} {example.key}: {example.token_ids.size} tokens, and the model has positions for {student.positions} "
                    f"(max_position_embeddings, model.path {path}); set data.max_tokens={student.positions} with data.overlong=drop, "
                    "shorten the row, or extend the model's rope_parameters",
                    field="data.max_tokens",
                )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id >= rows:
        raise ModelError(
            f"model.path {path}: its tokenizer pads with {_shown(tokenizer, pad_id)}, and the model has {rows} rows, ids 0 to {rows - 1}; "
            "resize the model's embeddings (resize_token_embeddings), or name a pad_token that it knows in tokenizer_config.json"
        )


def _shown(tokenizer: Any, token_id: int) -> str:
    return f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"
