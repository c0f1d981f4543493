"""What of a tokenizer is needed to read texts with it, as plain values that travel to another process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class TokenizerFiles:
    """A teacher's tokenizer and chat template.

    Attributes:
        tokenizer_json: of the fast tokenizer.
        rows: of the model's head; the byte table has as many entries at least.
        template: the text of its chat template; "" for none.
        tools_template: the text for conversations with tools, if it is another; "" if not.
        special_tokens: the tokens that templates know by name (`bos_token`, `eos_token`, ...).
        adds_bos: the tokenizer puts bos before text by itself.
        end: the token that ends an answer: what the template writes behind one, or eos; "" where there is neither.
    """

    tokenizer_json: str
    rows: int
    template: str = ""
    tools_template: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    adds_bos: bool = False
    end: str = ""

    @property
    def bos(self) -> str:
        return self.special_tokens.get("bos_token", "")

    @property
    def eos(self) -> str:
        return self.special_tokens.get("eos_token", "")

    def to_bytes(self) -> bytes:
        """For another process."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of_bytes(cls, data: bytes) -> TokenizerFiles:
        """What `to_bytes` wrote."""
        return cls(**json.loads(data))

    def source(self, *, tools: bool) -> str:
        """The text of the template for a conversation with or without tools."""
        return (self.tools_template if tools else "") or self.template
