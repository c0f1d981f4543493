"""`python -m student_trainer.cli` is `student-trainer`; both begin here, so that Ctrl-C is one line from the first import on."""

import signal
import sys


def start() -> None:
    """The console script."""
    try:
        from student_trainer.cli.main import main

        main()
    except KeyboardInterrupt:
        _is_ending()
        print("student-trainer: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as end:
        if end.code == 130:
            _is_ending()
        raise


def _is_ending() -> None:
    """Ignores further signals: libraries take seconds to shut down, and a signal amid that is a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    start()
