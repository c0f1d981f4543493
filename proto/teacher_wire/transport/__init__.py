"""Connections: channel, client, servicer, and what bounds them."""
