"""What can be wrong with a machine, a certificate or a way to a server: checks of both `doctor` commands, which change nothing."""
