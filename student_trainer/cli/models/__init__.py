"""Commands about models: made, measured, asked, handed on."""
