"""A run with several teachers: how their answers become labels of the loss, and how it ends when one of them is away."""
