"""One text in the tokens of two tokenizers: which of them belong together (algorithms.md 8)."""
