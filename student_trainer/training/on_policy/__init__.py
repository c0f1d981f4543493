"""Rollouts as windows: the source that the trainer learns from, and what ties it to a run."""
