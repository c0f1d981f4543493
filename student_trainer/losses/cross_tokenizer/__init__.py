"""Distillation from a teacher with another tokenizer (docs/concepts/method.md 8.4)."""
