"""A teacher's tokenizer: as its file says, and what a student is told of it.

In: a model folder; out: a fast tokenizer, and the digests by which students recognise it. The student's house has the same rule for
its own (`student_trainer.data.text.tokenizer_file`): both must read one file alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from teacher_server.errors import ServerConfigError
from teacher_server.tokenizing.files import TokenizerFiles
from teacher_server.tokenizing.rendering import written_end
from teacher_wire.core.identity import (
    added_tokens,
    base_tokenizer_sha256,
    default_template,
    template_sha256,
    tokenizer_sha256,
)

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


def tokenizer_files(tokenizer: Any, rows: int) -> TokenizerFiles | None:
    """What Tokenize needs of a tokenizer; None where its chat template does not come to an end.

    Args:
        tokenizer: of transformers.
        rows: of the model's head.
    """
    written = tokenizer.backend_tokenizer.to_str()
    own = tokenizer.chat_template
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template, eos = default_template(own) or "", special.get("eos_token", "")
    controls = {entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special} | ({eos} - {""})
    end = written_end(template, special, controls) if template else ""
    if end is None:
        return None
    bos = tokenizer.bos_token_id
    return TokenizerFiles(
        written, rows, template, own.get("tool_use", "") if isinstance(own, Mapping) else "", special,
        adds_bos=bos is not None and tokenizer("a")["input_ids"][:1] == [bos], end=end or eos,
    )  # fmt: skip


def _keeps_text(tokenizer: Any) -> bool:
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == _PROBE)
