"""Labels on disk, for both houses: one file per sequence, named by content."""
