"""Arms of one config, trained at equal steps or equal time with several seeds, and what they reached."""
