"""What is said of work that takes its time, on a terminal and elsewhere."""

import io

from rich.console import Console

from student_trainer.progress import working


def test_off_a_terminal_it_is_a_line_that_stays():
    told = io.StringIO()
    with working(Console(file=told, width=80), "converting by [tools]/convert.py"):
        assert told.getvalue() == "converting by [tools]/convert.py ...\n"
    assert told.getvalue().count("\n") == 1


def test_on_a_terminal_it_moves_and_goes():
    told = io.StringIO()
    console = Console(file=told, width=80, force_terminal=True, _environ={"TERM": "xterm"})
    with working(console, "merging"):
        pass
    assert "merging" in told.getvalue() and "..." not in told.getvalue()
    assert told.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the line is taken away"
