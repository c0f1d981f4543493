"""The sections on which rows come when."""
