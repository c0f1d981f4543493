"""On-policy samples: which sequences of a window the student writes itself, with which weights, and how they become windows."""
