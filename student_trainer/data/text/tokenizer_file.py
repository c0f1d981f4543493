"""The tokenizer of a model folder, as its file says.

In: a folder or hub id; out: transformers' tokenizer. The server's house has the same rule (`teacher_server.backends.tokenizer`):
both must read one file alike.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_PROBE = "the cat: 3 + 4 = 7"


def load_tokenizer(folder: Any, **where: Any) -> Any:
    """The tokenizer of a folder; where transformers' class for it loses text, the file tokenizer.json as it is.

    transformers 5 builds some tokenizers anew from their vocabulary (a DeepSeek V3 that calls itself LlamaTokenizerFast gets
    SentencePiece's spaces in the place of its bytes, and loses every space).

    Args:
        folder: or hub id.
        where: `revision`, as `from_pretrained` takes it.

    Raises:
        OSError, ValueError, KeyError, ImportError: as `AutoTokenizer`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    if not getattr(tokenizer, "is_fast", False) or _keeps_text(tokenizer):
        return tokenizer
    try:
        as_written = PreTrainedTokenizerFast.from_pretrained(folder, **where)
    except (OSError, ValueError):
        return tokenizer
    if not _keeps_text(as_written):
        return tokenizer
    log.warning(
        "%s reads %s otherwise than its tokenizer.json says; the file is taken", type(tokenizer).__name__, folder
    )
    return as_written


def _keeps_text(tokenizer: Any) -> bool:
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == _PROBE)
