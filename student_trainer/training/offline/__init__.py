"""What a run asks of its teachers from its first step to its last, and which of it is on disk already."""
