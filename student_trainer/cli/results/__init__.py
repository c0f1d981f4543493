"""Commands about finished runs: arms beside each other, and one page of all of it."""
