"""What every command stands in: the table of commands, of which only the called one is read, and the habits that all of them share."""
