"""From the order of a run to verified labels: prefetched in one background thread, joined by micro-batch number."""
