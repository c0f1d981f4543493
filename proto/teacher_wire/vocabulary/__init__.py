"""Which bytes the ids of a tokenizer stand for."""
