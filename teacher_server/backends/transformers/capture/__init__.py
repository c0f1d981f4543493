"""Values from inside a pass over the layers, taken while the pass makes the final states (`signals.captured`)."""
