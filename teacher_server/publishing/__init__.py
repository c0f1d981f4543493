"""Published revisions on disk: what is received, what it must fit, which one is wanted, which ones are kept. No network, no Ray."""
