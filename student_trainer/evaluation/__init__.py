"""Held-out figures, comparisons with intervals, plots and reports."""
