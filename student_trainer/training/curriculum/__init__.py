"""Rows from easy to hard: how hard each is, which come when, and what of that is kept with the run."""
