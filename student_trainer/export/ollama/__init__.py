"""Ollama: a chat template as a Go template, proved on conversations, and the Modelfile around it."""
