"""Checkpoints: what is in one, and when the trainer writes, reads, keeps and removes them."""
