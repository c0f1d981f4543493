"""Tokenize: texts of a student in the tokens of a teacher with another tokenizer."""
