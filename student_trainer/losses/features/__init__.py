"""Losses on what happens inside the layers: hidden states, attention, FFN activation (algorithms.md 4, 5, 6)."""
