"""The demo's rooms: real text, a tokenizer and models that fit two cores; nothing outside `deploy/` imports it."""
