"""Sequence-level distillation: the rows of a run with the teacher's own answers in place of theirs."""
