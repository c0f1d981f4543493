"""What is minimised: align -> rows -> divergence | truncated -> output; `measure` for evaluation."""
