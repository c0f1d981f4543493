"""What `up` does: starts Ray, deploys teachers and edges, rolls updates, follows the config file."""
