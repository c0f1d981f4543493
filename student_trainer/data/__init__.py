"""Rows to token ids with loss masks: sources -> formats -> templates -> dataset."""
