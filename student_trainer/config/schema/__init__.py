"""The JSON schema of a config, by which editors complete and check what is written."""
