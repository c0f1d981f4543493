"""The loss on output distributions: distillation and cross-entropy over one chunked pass through the head."""
