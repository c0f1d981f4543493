"""Reductions of signals of chosen blocks: of values that a backend captured inside the pass (`signals.captured`)."""
