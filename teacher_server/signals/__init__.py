"""Reductions on the model's device: logits in, the few numbers that travel out, before any copy to the host."""
