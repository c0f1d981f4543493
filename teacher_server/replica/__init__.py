"""One replica of a teacher: queues, engine, health, and the Serve deployment around them."""
