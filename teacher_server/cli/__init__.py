"""The `teacher-server` command; loads neither torch nor ray for its help."""
