"""Configs of runs and traces as pydantic models, and how their files are read."""
