"""Teachers computed by transformers' models."""
