"""JSON schemas as grammars over a teacher's tokens, by xgrammar.

In: a schema that `teacher_wire.generate.schemas` let through; out: which tokens may come next. What it yields is checked again by
the student: a grammar is a help to the model, not a proof.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import threading
from typing import Any

import torch
from torch import Tensor as Torch

from teacher_wire.core.errors import LimitError, RequestError

_CACHE_BYTES = 256 << 20  # of compiled grammars; the one in use may be as large again
_MAX_GRAMMAR_BYTES = 128 << 20
_PLACE_IN_XGRAMMAR = re.compile(r"^\[[\d:]+\] \S+: ")
# JSON without white space between its parts, as vLLM writes it with `disable_any_whitespace`: a model that may put some puts it without end.
_SEPARATORS = (",", ":")
# A character of a string of bounded length, as xgrammar (0.2.8) writes it, and as JSON means it: without control characters.
_ANY_CHARACTER, _JSON_CHARACTER = r"[^\"\\\r\n]", r"[^\0-\x1f\"\\\r\n]"


def available() -> bool:
    """Whether xgrammar is installed."""
    return importlib.util.find_spec("xgrammar") is not None


@functools.lru_cache(64)
def strict_text(schema: str) -> str:
    """The grammar of a JSON schema as text, for an engine that compiles it itself: strings of bounded length hold no control character.

    Args:
        schema: one that `Grammars.compile` takes.
    """
    import xgrammar

    text = str(xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=_SEPARATORS))
    return text.replace(_ANY_CHARACTER, _JSON_CHARACTER)


class Grammars:
    """Compiles and keeps grammars of one tokenizer; may be used from two threads.

    Args:
        tokenizer: of transformers.
        vocab_rows: ids that may be written.
        end_ids: the teacher's own ends of text.

    Attributes:
        clean_V: bool [V], False where a token holds what JSON text never holds.
    """

    def __init__(self, tokenizer: Any, vocab_rows: int, end_ids: frozenset[int]) -> None:
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_rows, stop_token_ids=sorted(end_ids) or None
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
        self._matcher = xgrammar.GrammarMatcher
        self._lock = threading.Lock()
        # As in `strict_text`; what a whole token holds is looked at once.
        clean = [not any(byte < 32 and byte not in b"\r\n" for byte in token) for token in info.decoded_vocab]
        self.clean_V = torch.tensor(clean)[:vocab_rows]

    def compile(self, schema: str) -> Any:
        """The grammar of a schema.

        Raises:
            RequestError, LimitError: there is none, or it is too large.
        """
        with self._lock:
            try:
                compiled = self._compiler.compile_json_schema(schema, any_whitespace=False, separators=_SEPARATORS)
            except Exception as error:  # xgrammar raises what its C++ throws
                said = _PLACE_IN_XGRAMMAR.sub("", " ".join(str(error).split()))[:200]
                raise RequestError(f"no grammar can be made of the schema: {said}", field="json_schema") from error
        if compiled.memory_size_bytes > _MAX_GRAMMAR_BYTES:
            size = compiled.memory_size_bytes
            raise LimitError("the grammar is too large", field="json_schema", value=size, limit=_MAX_GRAMMAR_BYTES)
        return compiled

    def follow(self, schema: str, stop_ids: frozenset[int]) -> Follower:
        """Where a new text stands in the grammar of `schema`; it ends with one of `stop_ids`, or by itself if there are none."""
        matcher = self._matcher(
            self.compile(schema),
            override_stop_tokens=sorted(stop_ids) or None,
            terminate_without_stop_token=not stop_ids,
        )
        return Follower(matcher)


class Follower:
    """One text's place in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, bits_bW: Torch, row: int) -> None:
        """Writes into one row which ids may come next, 32 to an int32; on the host."""
        self._matcher.fill_next_token_bitmask(bits_bW, row)

    def accept(self, token_id: int) -> bool:
        """Goes on by one token; whether the text is complete with it."""
        accepted = self._matcher.accept_token(token_id)
        assert accepted, "only allowed tokens are sampled"
        return bool(self._matcher.is_terminated())


def unpack(bits_bW: Torch, vocab_rows: int) -> Torch:
    """bool [b, V] of bits as `Follower.fill` writes them."""
    shifted_bW32 = bits_bW[..., None] >> torch.arange(32, dtype=torch.int32, device=bits_bW.device)
    return (shifted_bW32 & 1).flatten(1)[:, :vocab_rows].bool()
