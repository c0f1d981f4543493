"""Artifacts: what a student fetches once from a teacher and keeps by its digest, such as the output head."""
