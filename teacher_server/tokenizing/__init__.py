"""A teacher's tokenizer at work for Tokenize: conversations as its chat template writes them, in its ids, in a process of its own."""
