"""The student as a teacher of its server: when its weights are sent, and what becomes of them."""
