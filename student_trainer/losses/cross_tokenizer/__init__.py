"""Distillation from a teacher with another tokenizer (algorithms.md 8.4)."""
