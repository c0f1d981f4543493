"""The `student-trainer` command; loads neither torch nor ray for its help."""
