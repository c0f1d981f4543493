"""What a run tells a person on its way: the console, trackers, and one line where memory ran out."""
