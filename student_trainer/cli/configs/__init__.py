"""Commands about configs alone: `check` and `config show|schema`."""
