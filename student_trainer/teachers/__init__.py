"""Who teaches: connection, identity, limits, output head."""
