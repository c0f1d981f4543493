"""How teachers read the rows of a run: which of them, and in which tokens."""
