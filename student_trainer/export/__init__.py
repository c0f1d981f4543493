"""A trained student made ready to be served: merged, quantised or converted, and held against the trained model before it counts as done."""
