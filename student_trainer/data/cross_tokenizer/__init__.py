"""One text in the tokens of two tokenizers: which of them belong together (docs/concepts/method.md 8)."""
