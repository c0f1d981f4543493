"""The output loss with several teachers: what each gives to a chunk of rows, and how their parts are joined."""
