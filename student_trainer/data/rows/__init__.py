"""Rows as people bring them: files, formats, conversations."""
