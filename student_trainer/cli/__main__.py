"""`python -m student_trainer.cli` is `student-trainer`; both begin here, so that Ctrl-C is one line from the first import on."""

import sys


def start() -> None:
    """The console script."""
    try:
        from student_trainer.cli.main import main

        main()
    except KeyboardInterrupt:
        print("student-trainer: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
