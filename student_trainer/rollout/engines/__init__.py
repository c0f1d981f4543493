"""What writes rollouts: one module per engine, and the table of them."""
