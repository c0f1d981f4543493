"""The student: loading, adapters, precision, the probe of its logits."""
