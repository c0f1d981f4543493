"""The server's config as pydantic models, and how its file is read."""
