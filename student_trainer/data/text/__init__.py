"""Conversations as token ids: chat templates, their layout, control tokens, loss masks."""
