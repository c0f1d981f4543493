"""A teacher's tokenizer: as its file says, and what a student is told of it.

In: a model folder; out: a fast tokenizer, and the digests by which students recognise it. The student's house has the same rule for
its own (`student_trainer.data.text.tokenizer_file`): both must read one file alike.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from teacher_server.errors import ServerConfigError
from teacher_wire.core.identity import added_tokens, base_tokenizer_sha256, template_sha256, tokenizer_sha256

log = logging.getLogger(__name__)

_PROBE = "the cat: 3 + 4 = 7"


def load_tokenizer(folder: Path, model: str = "") -> Any:
    """The tokenizer of a folder; where transformers' class for it loses text, the file tokenizer.json as it is.

    transformers 5 builds some tokenizers anew from their vocabulary (a DeepSeek V3 that calls itself LlamaTokenizerFast gets
    SentencePiece's spaces in the place of its bytes, and loses every space).

    Raises:
        ServerConfigError: it is no fast one; `model` is what the config calls it, if not by its folder.
        OSError, ValueError, KeyError, ImportError: as `AutoTokenizer`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise ServerConfigError(
            f"model {model or str(folder)!r} has no fast tokenizer (tokenizer.json), which the handshake needs"
        )
    if _keeps_text(tokenizer):
        return tokenizer
    try:
        as_written = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError):
        return tokenizer
    if not _keeps_text(as_written):
        return tokenizer
    log.warning(
        "%s reads %s otherwise than its tokenizer.json says; the file is taken", type(tokenizer).__name__, folder
    )
    return as_written


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """The fields of `ModelFacts` that say which tokenizer and chat template this is."""
    written = tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer_sha256": tokenizer_sha256(written),
        "base_tokenizer_sha256": base_tokenizer_sha256(written),
        "added_tokens": added_tokens(written),
        "chat_template_sha256": template_sha256(tokenizer.chat_template),
    }


def _keeps_text(tokenizer: Any) -> bool:
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == _PROBE)
