"""A student with adapters as one model without: from the weights that it has now, or from values that another place holds."""
