"""What a run would do, take and cost, told before it does it."""
