"""Reasoning traces: asked of a teacher, verified here, kept as rows to train on."""
