"""The report of runs and comparisons as one HTML page that asks nobody for anything, and as Markdown."""
