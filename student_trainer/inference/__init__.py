"""A trained student at work: loading it, its prompts, its answers as they are written, and those of a served teacher beside them."""
