"""The student: a trainer that streams labels from a teacher server and applies generalised knowledge distillation."""
