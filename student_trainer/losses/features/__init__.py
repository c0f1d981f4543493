"""Losses on what happens inside the layers: hidden states, attention, FFN activation (docs/concepts/method.md 4, 5, 6)."""
