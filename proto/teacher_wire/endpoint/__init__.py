"""Client and servicer: both ends of a connection, and what answers behind it."""
