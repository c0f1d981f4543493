"""The tokenizer's process: the same rows as in this one, and rows that loop, bloat or kill it take no other row along."""

import contextlib
import json
import os
import resource
import threading

import pytest

from teacher_server.tokenizing import process as process_room
from teacher_server.tokenizing.files import TokenizerFiles
from teacher_server.tokenizing.process import TokenizerProcess
from teacher_server.tokenizing.rows import RowReader
from teacher_wire.core.errors import UnavailableError
from teacher_wire.tokenizing.messages import TextRow
from tests.teacher_server.tokenizing.test_rows import byte_level

# Loops, or grows, as its first message says: range is bounded in the sandbox, loops in loops are not.
TEMPLATE = (
    "{% set what = messages[0].content %}"
    "{% if what == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}{% endif %}"
    "{% if what == 'bloat' %}{{ ('x' * 3000000000) | length }}{% endif %}"
    "{{ what }}:"
)
FILES = TokenizerFiles(byte_level().to_str(), 400, TEMPLATE, "", {"eos_token": "<|im_end|>"}, end="<|im_end|>")


def row(what):
    return TextRow(b"the cat", json.dumps({"messages": [{"role": "user", "content": what}]}).encode())


@pytest.fixture
def tokenizer():
    made = TokenizerProcess(FILES, row_s=0.3, memory_bytes=1 << 30)
    yield made
    made.close()


def test_it_is_read_whatever_number_its_pipe_has(tokenizer):
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        pytest.skip("this process may not have so many files open")
    with contextlib.ExitStack() as taken:
        here = os.open(os.curdir, os.O_RDONLY)
        taken.callback(os.close, here)
        while (number := os.dup(here)) < 1030:
            taken.callback(os.close, number)
        taken.callback(os.close, number)
        (answer,) = tokenizer.rows([row("go on")])
    assert not answer.refused


def every(tokenizer, rows):
    """All answers, in as many turns as they take."""
    answers = []
    while len(answers) < len(rows):
        answers += tokenizer.rows(rows[len(answers) :])
    return answers


def test_rows_that_loop_or_bloat_are_refused_and_the_others_answered(tokenizer):
    rows = [row("a"), row("loop"), row("b"), row("bloat"), TextRow(b"\xff"), row("c"), row("loop")]
    answers = every(tokenizer, rows)
    refused = [answer.refused for answer in answers]
    assert [bool(reason) for reason in refused] == [False, True, False, True, True, False, True]
    assert refused[1] == refused[6] == "it takes more than 0.3 s to render and tokenise"
    assert "memory" in refused[3].lower() and "UTF-8" in refused[4]
    here = RowReader(FILES)
    for number in (0, 2, 5):
        assert answers[number].digest == here.row(rows[number]).digest
    assert tokenizer.starts == 2, "one, and one after the first loop; the last is not followed by a row"


def test_a_turn_ends_with_a_row_that_took_it_and_the_rest_is_for_the_next(tokenizer):
    """Others are waiting: 256 rows of almost ten seconds are not one tenant's to ask for at once."""
    busy = TokenizerProcess(FILES, turn_s=0.0)
    try:
        assert len(busy.rows([row("a"), row("b"), row("c")])) == 1
        assert [len(busy.rows([row("a")])), busy.starts] == [1, 1], "the process has forgotten what was left"
    finally:
        busy.close()
    assert len(tokenizer.rows([row("a"), row("loop"), row("b")])) == 2
    assert len(tokenizer.rows([row("a"), row("b"), row("c")])) == 3


def test_a_row_that_nobody_has_thought_of_costs_no_process(tokenizer):
    nested = [
        b'{"messages":[{"role":"user","content":"a","x":' + b"[" * depth + b"]" * depth + b"}]}"
        for depth in range(960, 1000)  # about what JSON refuses, and what is walked does not reach
    ]
    half = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    answers = every(tokenizer, [TextRow(b"the cat", data) for data in (half, *nested)] + [row("a")])
    assert "half of a surrogate pair" in answers[0].refused and not answers[-1].refused
    assert tokenizer.starts == 1


def test_a_process_that_is_killed_costs_no_row(tokenizer):
    assert not tokenizer.rows([row("a")])[0].refused
    tokenizer._process.kill()  # as the kernel does when memory runs out
    tokenizer._process.wait()
    assert not tokenizer.rows([row("a")])[0].refused and tokenizer.starts == 2


def test_a_row_on_which_the_process_dies_twice_is_refused(tokenizer, monkeypatch):
    read, deaths = TokenizerProcess._read, []

    def dying(self, process, within_s):
        if self._started_rows(within_s):
            deaths.append(1)
            process.kill()
            raise EOFError
        return read(self, process, within_s)

    monkeypatch.setattr(TokenizerProcess, "_read", dying)
    monkeypatch.setattr(
        TokenizerProcess, "_started_rows", lambda self, within_s: within_s < process_room._START_S, raising=False
    )
    [answer] = tokenizer.rows([row("a")])
    assert answer.refused == "the tokenizer ended on it twice (code -9)" and len(deaths) == 2


def test_a_call_ends_when_the_teacher_goes(tokenizer):
    tokenizer._row_s = 30.0
    assert not tokenizer.rows([row("a")])[0].refused
    threading.Timer(0.3, tokenizer.close).start()
    with pytest.raises(UnavailableError, match="going away"):
        tokenizer.rows([row("loop")])
    with pytest.raises(UnavailableError, match="going away"):
        tokenizer.rows([row("a")])


def test_a_process_that_does_not_start_says_so():
    broken = TokenizerProcess(TokenizerFiles("{}", 10))
    with pytest.raises(UnavailableError, match="does not start"):
        broken.rows([row("a")])
