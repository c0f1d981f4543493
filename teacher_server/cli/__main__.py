"""`python -m teacher_server.cli` is `teacher-server`; both begin here, so that Ctrl-C is one line from the first import on."""

import sys


def start() -> None:
    """The console script."""
    try:
        from teacher_server.cli.main import main

        main()
    except KeyboardInterrupt:
        print("teacher-server: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
