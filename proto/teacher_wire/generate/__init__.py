"""Samples of a teacher: messages, bytes, client and servicer."""
