"""Files of prompts, files of answers, the chat, and the command, with a student and a served teacher."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from student_trainer.data.rows.formats import Turn
from student_trainer.errors import ConfigError, DataError, RunError
from student_trainer.inference import by_file
from student_trainer.inference.chat import Chat
from student_trainer.inference.prompt_file import read_prompts
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.speakers import Opening, TeacherSpeaker, open_speakers
from tests.e2e.conftest import call_cli

SHORT = Sampling(max_new_tokens=6)


def asked(path, **options):
    return [
        [(turn.role, turn.content) for turn in one.conversation.turns] for one in read_prompts(str(path), **options)
    ]


# ------------------------------------------------------------------ prompts in


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "a"}, [("user", "a")]),
        ({"prompt": "a", "completion": "known"}, [("user", "a")]),
        ({"instruction": "a", "input": "b"}, [("user", "a\nb")]),
        ({"instruction": "a", "output": ""}, [("user", "a")]),
        ({"question": "a", "answer": "known"}, [("user", "a")]),
        ({"query": "a", "history": [["x", "y"]]}, [("user", "x"), ("assistant", "y"), ("user", "a")]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, [("system", "s"), ("user", "a")]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "known"}]}, [("user", "a")]),
        ({"conversations": [{"from": "human", "value": "a"}]}, [("user", "a")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "known"}]}, [("user", "a")]),
    ],
)  # fmt: skip
def test_rows_are_prompts_with_or_without_their_answers(tmp_path, row, turns):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert asked(tmp_path / "p.jsonl") == [turns]
    if turns[0][0] != "system":
        assert asked(tmp_path / "p.jsonl", system="be kind") == [[("system", "be kind"), *turns]]


def test_plain_lines_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("the cat\n\n  an old dog 猫\r\n")
    assert asked(tmp_path / "p.txt") == [[("user", "the cat")], [("user", "  an old dog 猫")]]
    assert [one.key for one in read_prompts(str(tmp_path / "p.txt"))] == [f"{tmp_path}/p.txt:1", f"{tmp_path}/p.txt:3"]


def test_prompts_that_are_none_are_told(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a"}\n{"prompt": 7}\n')
    (tmp_path / "strange.jsonl").write_text('{"text": "a"}\n')
    for name, told in (("empty.txt", "holds no prompt"), ("odd.jsonl", "odd.jsonl:2"), ("strange.jsonl", "split it into prompt"), ("gone.jsonl", "no such file")):  # fmt: skip
        with pytest.raises(DataError, match=told):
            read_prompts(str(tmp_path / name))


# ------------------------------------------------------------------ answers out


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(7)))
    return read_prompts(str(tmp_path / "p.jsonl"))


@pytest.fixture
def student(adapter):
    with open_speakers([("after", str(adapter))], Opening(batch_size=2), Console(quiet=True)) as speakers:
        yield speakers[0]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_that_is_too_long_is_named_before_the_first_answer(tmp_path, student):
    (tmp_path / "q.txt").write_text("the cat\n" + "the cat " * 3000 + "\nthe dog\n")
    with pytest.raises(ConfigError, match=r"q\.txt:2: a prompt of [0-9,]+ tokens and --max-new-tokens"):
        by_file.answer_file(
            read_prompts(str(tmp_path / "q.txt")), [student], SHORT, tmp_path / "a.jsonl", Console(quiet=True)
        )
    assert not (tmp_path / "a.jsonl").exists()


def test_a_served_teachers_limit_names_the_prompt_too():
    limits = SimpleNamespace(max_sequence_tokens=20)
    speaker = TeacherSpeaker("big", SimpleNamespace(prompter=None, info=SimpleNamespace(limits=limits)))
    sampling = Sampling(max_new_tokens=8)
    speaker.check_room(12, sampling, "q.txt:1")
    with pytest.raises(ConfigError, match=r"q\.txt:2: a prompt of 13 tokens .* more than the 20 that big takes"):
        speaker.check_room(13, sampling, "q.txt:2")


def test_a_restart_goes_on_where_it_was(tmp_path, prompts, student, monkeypatch):
    """Interrupted in the third batch, with a torn line behind it: the file is that of an uninterrupted command, and nothing is written twice."""
    quiet, sampling = Console(quiet=True), Sampling(temperature=1.0, max_new_tokens=6, seed=4)
    straight, out = tmp_path / "straight.jsonl", tmp_path / "a.jsonl"
    assert by_file.answer_file(prompts, [student], sampling, straight, quiet, 2) == 0
    own, calls = type(student).answers, []

    def interrupted(self, conversations, *rest):
        calls.append(len(conversations))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, conversations, *rest)

    monkeypatch.setattr(type(student), "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_file.answer_file(prompts, [student], sampling, out, quiet, 2)
    partial = tmp_path / "a.jsonl.partial"
    assert not out.exists() and partial.is_file()
    with partial.open("a") as file:
        file.write('{"source": "torn')
    with pytest.raises(RunError, match="left of other prompts, models or settings"):
        by_file.answer_file(prompts, [student], SHORT, out, quiet, 2)
    assert by_file.answer_file(prompts, [student], sampling, out, quiet, 2) == 4
    assert calls == [2, 2, 2, 2, 1]
    assert out.read_bytes() == straight.read_bytes()
    assert [row["source"] for row in lines(out)] == [one.key for one in prompts]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "p.jsonl", "straight.jsonl"]
    with pytest.raises(RunError, match="exists already"):
        by_file.answer_file(prompts, [student], sampling, out, quiet, 2)


def test_answers_are_rows_to_train_on(tmp_path, prompts, student):
    by_file.answer_file(prompts[:2], [student], SHORT, tmp_path / "a.jsonl", Console(quiet=True))
    assert asked(tmp_path / "a.jsonl") == [[("user", "the cat 0")], [("user", "the cat 1")]]
    row = lines(tmp_path / "a.jsonl")[0]
    assert row["messages"][-1]["role"] == "assistant" and row["finish"] in ("stop", "length") and row["tokens"] <= 6


# ------------------------------------------------------------------ chat


class Script:
    """A user who types lines; an exception among them is what a key does."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


def chat_of(speakers, *typed, system=""):
    out, told = io.StringIO(), io.StringIO()
    chat = Chat(speakers, SHORT, system, Console(file=out, width=80), Console(file=told, width=200), Script(*typed))
    chat.run()
    return chat, out.getvalue(), told.getvalue()


def roles(chat, name="after"):
    return [turn.role for turn in chat._turns[name]]


def test_a_chat_keeps_its_conversation_until_it_is_reset(student):
    chat, out, told = chat_of([student], "the cat", "and a dog", system="short")
    assert roles(chat) == ["system", "user", "assistant", "user", "assistant"]
    [first] = student.answers([_talk("short", "the cat")], SHORT)
    assert chat._turns["after"][2].content == first.text and first.text in out
    assert "tok/s" in told and "tok/s" not in out, "answers alone go to standard output"
    chat, _, told = chat_of([student], "the cat", "/reset", "the dog", system="short")
    assert roles(chat) == ["system", "user", "assistant"] and chat._turns["after"][1].content == "the dog"
    chat, _, told = chat_of(
        [student], "the cat", "/system other words", "the dog", "/quit", "never asked", system="short"
    )
    assert [t.content for t in chat._turns["after"][:2]] == ["other words", "the dog"]
    chat, _, told = chat_of([student], "/rest", "//path", "/system", "", "  ")
    assert "unknown command /rest" in told and roles(chat) == []


def _talk(system, message):
    from student_trainer.data.rows.formats import Conversation

    return Conversation((Turn("system", system), Turn("user", message)))


def test_messages_of_several_lines(student):
    chat, _, _ = chat_of([student], '"""', "a", " b", '"""', "/quit")
    assert chat._turns["after"][0].content == "a\n b"
    chat, _, _ = chat_of([student], "a\\", "b", "/quit")
    assert chat._turns["after"][0].content == "a\nb"
    chat, _, _ = chat_of([student], "half a", KeyboardInterrupt, "/quit")
    assert chat._turns["after"][0].content == "half a", "Ctrl-C at the prompt ends nothing"
    chat, _, _ = chat_of([student], '"""', "taken back", KeyboardInterrupt, "the cat", "/quit")
    assert chat._turns["after"][0].content == "the cat"


def test_ctrl_c_ends_an_answer_and_keeps_what_was_written(student, monkeypatch):
    """The user's Ctrl-C comes while the third token is awaited."""
    own = student.writer.stream

    def stream(ids, sampling, number=0):
        for count, token in enumerate(own(ids, sampling, number)):
            if count == 2:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(student.writer, "stream", stream)
    chat, _, told = chat_of([student], "the cat")
    [whole] = student.answers([_conversation("the cat")], SHORT)
    assert "2 tokens" in told and "stopped" in told
    assert all(whole.text.startswith(turn.content) for turn in chat._turns["after"][1:])


def _conversation(message):
    from student_trainer.data.rows.formats import Conversation

    return Conversation((Turn("user", message),))


def test_an_error_is_told_and_the_chat_goes_on(student):
    chat, _, told = chat_of([student], "cat " * 200, "the cat")
    assert "positions of the model" in told.replace("\n", " ") and roles(chat) == ["user", "assistant"]


# ------------------------------------------------------------------ side by side, and the command


def test_three_side_by_side(adapter, model_factory, served):
    """The teacher's column is what its model says called directly, though it is asked by its server."""
    named = [("before", str(model_factory("qwen2"))), ("after", str(adapter)), ("teacher", served)]
    with open_speakers(named, Opening(), Console(quiet=True)) as speakers:
        chat, out, _ = chat_of(speakers, "the cat", "a dog")
        assert all(name in out for name in ("before", "after", "teacher"))
        said = {name: chat._turns[name][1].content for name in ("before", "after", "teacher")}
        assert len(set(said.values())) == 3
    with open_speakers([("here", str(model_factory("qwen2", seed=5)))], Opening(), Console(quiet=True)) as (same,):
        assert same.answers([_conversation("the cat")], SHORT)[0].text == said["teacher"]


def test_the_command(tmp_path, run_folder, served, capsys, monkeypatch, prompts):
    """Run folder in, before/after/teacher out; and what a user gets wrong is one line."""
    out = tmp_path / "a.jsonl"
    options = ("--prompts", tmp_path / "p.jsonl", "--out", out, "--max-new-tokens", 5)
    code, told = call_cli(capsys, monkeypatch, "infer", "--compare", run_folder, served, *options)
    assert code == 0, told
    assert [list(row["answers"]) for row in lines(out)] == [["before", "after", "teacher"]] * 7
    for arguments, line in (
        ((run_folder, *options), "exists already"),
        ((run_folder, served), "add --compare"),
        ((run_folder, "--prompts", "p.jsonl"), "belong together"),
        ((tmp_path / "gone",), "no such folder"),
        ((run_folder, "--top-k", 4, *options[:2], "--out", tmp_path / "b.jsonl"), "mean nothing at --temperature 0"),
        (("--compare", run_folder, served, *options[:2], "--out", tmp_path / "c.jsonl", "--temperature", 1, "--top-k", 4), "leave --top-k out"),
        ((run_folder, "--template-kwargs", "[1]"), "must be an object"),
    ):  # fmt: skip
        code, told = call_cli(capsys, monkeypatch, "infer", *arguments)
        assert code == 2 and told.count("\n") == 1 and line in told, told
