"""`python -m teacher_server.cli` is `teacher-server`."""

from teacher_server.cli.main import main

main()
