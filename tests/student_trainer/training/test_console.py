"""What is printed while a run goes on: lines that stay, on a terminal and elsewhere, and what they say."""

import io
import types

import pytest
from rich.console import Console

from student_trainer.training.reporting.console import ConsoleProgress, Pace, describe_logs, span

ENTRY = {
    "loss": 1.5,
    "learning_rate": 1e-4,
    "tokens_per_s": 4200.0,
    "wait_share": 0.03,
    "cache_hits": 0.5,
    "staleness": 1.2,
}


def shown(entries, *, terminal, width=400, title="run"):
    file = io.StringIO()
    progress = ConsoleProgress(Console(file=file, force_terminal=terminal, width=width), title)
    state = types.SimpleNamespace(max_steps=10, global_step=0)
    progress.on_train_begin(None, state, None)
    for step, logs in enumerate(entries, 1):
        state.global_step = step
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, logs)
    progress.on_train_end(None, state, None)
    return file.getvalue()


def test_without_a_terminal_there_is_a_line_per_entry_with_all_that_explains_it():
    lines = shown([ENTRY] * 3, terminal=False).splitlines()
    assert len(lines) == 3 and lines[1].startswith("run step 2/10: loss 1.5000")
    for told in (
        "lr 0.0001",
        "4,200 tok/s",
        "waiting for the teacher 3%",
        "labels from disk 50%",
        "1.2 steps old",
        " left",
    ):
        assert told in lines[2]


def test_on_a_terminal_the_lines_stay_above_the_bar():
    said = shown([ENTRY] * 3, terminal=True)
    for step in (1, 2, 3):
        assert said.count(f"run step {step}/10:") == 1
    assert "wait 3%" in said and "store 50%" in said  # beside the bar


def test_a_run_that_hangs_on_its_teacher_is_told_so_once():
    slow = ENTRY | {"wait_share": 0.8}
    said = shown([slow] * 6, terminal=False)
    assert said.count("80% of the time the student waits for labels: the teacher limits this run") == 1
    assert "limits this run" not in shown([slow, ENTRY, slow, slow], terminal=False)


def test_a_name_with_brackets_is_printed_as_it_is():
    assert "run[red] step 1/10" in shown([ENTRY], terminal=False, title="run[red]")


def test_the_time_left_follows_the_newest_steps():
    now = [0.0]
    pace = Pace(100, lambda: now[0])
    assert pace.left_s is None
    for step, at_s in enumerate((50.0, 52.0, 54.0), 1):  # the first took 50 s, and says nothing of the rest
        now[0] = at_s
        pace.step(step)
    assert pace.left_s == pytest.approx(97 * 2.0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3599.9, "1 h 00 min"),
        (7260, "2 h 01 min"),
        (90_000, "1 d 01 h"),
    ],
)
def test_a_span_is_said_in_two_units(seconds, said):
    assert span(seconds) == said


def test_the_slowest_of_several_teachers_is_named():
    assert "for big alone 30%" in describe_logs({"wait_share": 0.4, "wait_share.big": 0.3, "wait_share.small": 0.1})
