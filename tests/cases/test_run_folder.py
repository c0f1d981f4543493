"""Cases 08, 14, 15, 16 and 29: whose folder it is, what `~` means, who is in it, what of it can be read, and what may be taken up.

Reported as nanochat#311, transformers#9822; robomimic#36; Lightning#12369; unsloth#6796; Lightning#15705.
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import pytest
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError, RunError
from student_trainer.files import LOCK_NAME, FolderLock
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.run import train
from tests.cases.material import INPUTS, MODELS, base_file, case_config, train_case
from tests.students import start_student

HALF = ("train.max_steps=4", "train.save_steps=2")


def said(console):
    return console.file.getvalue()


def quiet():
    return Console(file=io.StringIO(), width=300)


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture
def finished(tmp_path):
    """A run of 4 steps with checkpoints at 2 and 4; its final weights are known."""
    train(case_config(tmp_path, *HALF), console=quiet())
    return tmp_path / "run"


@pytest.fixture
def half(finished):
    """As if it had been killed between its last checkpoint and its end."""
    straight = digest(finished / "final")
    shutil.rmtree(finished / "final")
    (finished / "result.json").unlink()
    return finished, straight


# ---------------------------------------------------------------- case 08: others' folders


@pytest.mark.parametrize("name", ["checkpoint-merged", "checkpoint-12-best", "checkpoint-", "checkpoint-007", "checkpoint-2.bak", "checkpoint-9"])  # fmt: skip
def test_folders_of_the_user_are_left_alone(tmp_path, half, name):
    run, straight = half
    (run / name).mkdir()
    (run / name / "weights.bin").write_text("a week of work")
    shutil.rmtree(run / "checkpoint-4")
    train(case_config(tmp_path, *HALF, "train.keep_checkpoints=1"), resume=True, console=quiet())
    assert (run / name / "weights.bin").read_text() == "a week of work"
    assert digest(run / "final") == straight
    assert (run / "checkpoint-4" / "COMPLETE").is_file() and not (run / "checkpoint-2").exists()


def test_files_of_the_user_are_left_alone_too(tmp_path, half):
    run, _ = half
    (run / "checkpoint-notes.md").write_text("lr was too high")
    (run / "checkpoint-3").write_text("a file")
    (run / "final").mkdir()
    (run / "final" / "README.md").write_text("my model")
    train(case_config(tmp_path, *HALF), resume=True, console=quiet())
    assert (run / "checkpoint-notes.md").is_file() and (run / "checkpoint-3").is_file()
    assert (run / "final" / "README.md").read_text() == "my model" and (run / "final" / "model.safetensors").is_file()


def test_a_folder_with_the_name_of_a_checkpoint_to_come_is_named_before_step_0(tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2" / "mine").write_text("x")
    with pytest.raises(RunError, match="checkpoint-2: has the name of a checkpoint to come"):
        train(case_config(tmp_path, *HALF), resume=True, console=quiet())
    assert os.listdir(tmp_path / "run") == ["checkpoint-2"] and (tmp_path / "run" / "checkpoint-2" / "mine").is_file()


def test_a_folder_that_is_not_empty_is_not_called_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"is not empty \(it holds notes\.txt\)"):
        train(case_config(tmp_path), console=quiet())
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


# ---------------------------------------------------------------- case 14: ~ and relative paths


def test_home_is_home_everywhere(tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    shutil.copy(INPUTS / "rows.jsonl", home / "rows.jsonl")
    shutil.copytree(MODELS / "qwen2", home / "model")
    settings = ("run.output_dir=~/runs/x", "run.cache_dir=~/cache", "data.train=[~/rows.jsonl]", "data.eval=[~/rows.jsonl#1]", "model.path=~/model", *HALF)  # fmt: skip
    result = train(case_config(tmp_path, *settings), console=quiet())
    assert result.output_dir == home / "runs" / "x"
    assert {path.name for path in result.output_dir.iterdir()} >= {"run.json", "final", "checkpoint-4", "result.json"}
    assert not (work / "~").exists() and os.listdir(work) == []
    train(case_config(tmp_path, *settings), resume=True, console=quiet())


def test_an_unknown_home_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.output_dir: there is no such home directory"):
        case_config(tmp_path, "run.output_dir=~nobody-of-this-name/x")


def test_paths_in_sections_for_others_know_home_too(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    tree = {"run": {"output_dir": "~/x"}, "model": {"path": "m"}, "data": {"train": ["d"]}}
    config = parse_config(tree | {"teacher": {"embedded": "~/teacher.yaml", "ca_file": "~/ca.pem"}}, "test")
    assert (
        str(config.teacher.embedded) == "/somewhere/teacher.yaml" and str(config.teacher.ca_file) == "/somewhere/ca.pem"
    )
    assert str(config.run.cache_dir) == "/somewhere/.cache/lyceum"


def test_a_relative_folder_is_the_same_run_from_elsewhere(tmp_path, monkeypatch, half):
    run, straight = half
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(run / "checkpoint-4")
    config = case_config(tmp_path, "run.output_dir=run", *HALF)
    monkeypatch.chdir(elsewhere)  # between reading and writing
    train(config, resume=True, console=quiet())
    assert digest(run / "final") == straight and os.listdir(elsewhere) == []
    again = train(parse_config_of(run), resume=True, console=quiet())  # config.yaml is good from anywhere
    assert again.output_dir == run


def parse_config_of(run):
    from student_trainer.config.run import load_config

    return load_config(run / "config.yaml")


# ---------------------------------------------------------------- case 15: one process at a time


def test_the_second_of_two_is_refused_by_the_name_of_the_first_and_death_frees_the_folder(tmp_path):
    """The same line twice; then the first is killed without a word, and the line works."""
    settings = ("train.max_steps=100000", "train.save_steps=5", "train.log_steps=5")
    first = start_student("train", base_file(tmp_path), *settings, "--resume", "auto", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 200
        while not list((tmp_path / "run").glob("checkpoint-*/COMPLETE")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        second = train_case(tmp_path, *settings, resume=True)
        line = second.stderr.strip().splitlines()[-1]
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert f"process {first.pid} on {socket.gethostname()}" in line and "is at work in it" in line
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / LOCK_NAME).is_file(), "nobody took it away, and it locks nothing"
    with FolderLock(tmp_path / "run") as lock:
        lock.acquire()
    steps = steps_in(tmp_path / "run")
    assert steps == sorted(set(steps)), "nobody else wrote to the log"


def test_a_lock_is_one_process_at_a_time_and_leaves_nothing(tmp_path):
    with FolderLock(tmp_path / "run") as held, FolderLock(tmp_path / "run") as other:
        held.acquire()
        held.acquire()
        with pytest.raises(RunError, match=f"process {os.getpid()} on "):
            other.acquire()
        with pytest.raises(RunError, match="is at work in it"):
            train(case_config(tmp_path), console=quiet())
        held.release()
        other.acquire()
        with pytest.raises(RunError):
            held.acquire()
    assert os.listdir(tmp_path / "run") == []


def test_whoever_is_refused_leaves_what_the_holder_wrote_of_itself(tmp_path):
    with FolderLock(tmp_path / "run") as held:
        held.acquire()
        written = (tmp_path / "run" / LOCK_NAME).read_bytes()
        for _ in range(2):
            with pytest.raises(RunError, match=f"process {os.getpid()} on .*since 20"):
                FolderLock(tmp_path / "run").acquire()
        assert (tmp_path / "run" / LOCK_NAME).read_bytes() == written


def test_a_lock_may_be_given_back_by_another_thread(tmp_path):
    with FolderLock(tmp_path / "run") as held, FolderLock(tmp_path / "run") as other:
        thread = threading.Thread(target=held.acquire)
        thread.start()
        thread.join()
        with pytest.raises(RunError, match="is at work in it"):
            other.acquire()
        held.release()
        other.acquire()


def test_many_take_turns_and_never_two_at_once(tmp_path):
    """Threads that take and give back: each new holder meets files that the last one is taking away."""
    inside, worst, turns = 0, 0, []
    guard = threading.Lock()

    def work():
        nonlocal inside, worst
        while len(turns) < 200:
            lock = FolderLock(tmp_path / "run")
            try:
                lock.acquire()
            except RunError:
                continue
            with guard:
                inside += 1
                worst = max(worst, inside)
                turns.append(threading.get_ident())
            with guard:
                inside -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1 and os.listdir(tmp_path / "run") == []


def test_a_run_that_is_refused_for_its_lock_changes_nothing(tmp_path, half):
    run, _ = half
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with FolderLock(run) as held:
        held.acquire()
        with pytest.raises(RunError):
            train(case_config(tmp_path, *HALF), resume=True, console=quiet())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    told = []
    with FolderLock(tmp_path / "run", told.append) as lock:
        lock.acquire()
    assert len(told) == 1 and "knows no locks (Operation not supported)" in told[0]


# ---------------------------------------------------------------- case 16: damaged files


def cut(name, size):
    def damage(folder):
        os.truncate(folder / name, size)

    return damage


def blank(folder):
    file = folder / "trainer_state.json"
    file.write_bytes(b"\0" * file.stat().st_size)  # what a file system leaves of a file that was not synced


def renamed(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-2"), folder)


DAMAGES = {
    "weights cut": (cut("model.safetensors", 500), "model.safetensors has 500 bytes"),
    "optimizer cut": (cut("optimizer.safetensors", 10_000), "optimizer.safetensors has 10,000 bytes"),
    "state empty": (cut("training_state.json", 0), "training_state.json has 0 bytes"),
    "state blank": (blank, "trainer_state.json: its .* bytes are blank"),
    "random gone": (lambda folder: (folder / "random.safetensors").unlink(), "random.safetensors is missing"),
    "weights gone": (lambda folder: (folder / "model.safetensors").unlink(), "it has no weights"),
    "another's": (renamed, "it is of step 2, not of 4"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, half, kind):
    run, straight = half
    damage, named = DAMAGES[kind]
    damage(run / "checkpoint-4")
    shown = quiet()
    train(case_config(tmp_path, *HALF), resume=True, console=shown)
    (line,) = (line for line in said(shown).splitlines() if "damaged" in line)
    assert re.search(f"checkpoint-4 is damaged and not used: {named}", line)
    assert "resuming at step 2" in said(shown)
    assert digest(run / "final") == straight and checkpoint.damage_of(run / "checkpoint-4") == ""
    assert steps_in(run)[:4] == [1, 2, 3, 4]


def test_without_sizes_in_the_marker_damage_is_found_by_reading(tmp_path, half):
    """As an earlier version wrote it."""
    run, _ = half
    (run / "checkpoint-4" / "COMPLETE").write_text("every file of this checkpoint was on disk before this one\n")
    assert checkpoint.damage_of(run / "checkpoint-4") == ""
    os.truncate(run / "checkpoint-4" / "model.safetensors", 500)
    assert "model.safetensors" in checkpoint.damage_of(run / "checkpoint-4")


def test_damaged_checkpoints_do_not_push_good_ones_out(half):
    """Of what is kept, a damaged one that is newer than the step in hand is none."""
    run, _ = half
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    os.truncate(run / "checkpoint-4" / "model.safetensors", 500)
    checkpoint.rotate(run, keep=1, step=3)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_with_no_whole_checkpoint_it_starts_again_and_says_so(tmp_path, half):
    run, straight = half
    for step in (2, 4):
        os.truncate(run / f"checkpoint-{step}" / "model.safetensors", 500)
    shown = quiet()
    train(case_config(tmp_path, *HALF), resume=True, console=shown)
    assert "checkpoint-2 is damaged" in said(shown) and "starting at step 0" in said(shown)
    assert digest(run / "final") == straight


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b'{"settings": {', b"[]", b"{}", b"\xff\xfe", b'{"settings": 3, "teacher": "", "labels": ""}'])  # fmt: skip
def test_a_damaged_identity_is_one_line(tmp_path, half, content):
    run, _ = half
    (run / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json is damaged: ") as refused:
        train(case_config(tmp_path, *HALF), resume=True, console=quiet())
    assert "\n" not in str(refused.value) and (run / "checkpoint-4").is_dir()


def test_a_run_without_its_identity_is_not_taken_for_a_new_one(tmp_path, half):
    run, _ = half
    (run / "run.json").unlink()
    with pytest.raises(RunError, match=r"no run\.json"):
        train(case_config(tmp_path, *HALF), resume=True, console=quiet())
    assert (run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("content", [b"", b"{", b"3"])
def test_a_damaged_result_is_made_again(tmp_path, finished, content):
    straight = digest(finished / "final")
    (finished / "result.json").write_bytes(content)
    shown = quiet()
    assert train(case_config(tmp_path, *HALF), resume=True, console=shown).steps == 4
    assert "result.json is damaged" in said(shown) and digest(finished / "final") == straight


def test_a_damaged_log_entry_is_told_of(tmp_path, half):
    run, _ = half
    lines = (run / "train_log.jsonl").read_bytes().splitlines()
    (run / "train_log.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:9], *lines[2:], lines[3][:5]]))
    shown = quiet()
    train(case_config(tmp_path, *HALF), resume=True, console=shown)
    assert "train_log.jsonl: 1 entries cannot be read" in said(shown)
    assert steps_in(run)[:3] == [1, 3, 4]


# ---------------------------------------------------------------- case 29: digests decide


def test_the_same_rows_and_weights_elsewhere_are_the_same_run(tmp_path, half):
    run, straight = half
    shutil.rmtree(run / "checkpoint-4")
    rows = shutil.copy(INPUTS / "rows.jsonl", tmp_path / "copied.jsonl")
    model = shutil.copytree(MODELS / "qwen2", tmp_path / "copied")
    moved = shutil.move(run, tmp_path / "moved")
    config = case_config(tmp_path, f"data.train=[{rows}]", f"model.path={model}", f"run.output_dir={moved}", "data.max_tokens=300", *HALF)  # fmt: skip
    train(config, resume=True, console=quiet())
    assert digest(tmp_path / "moved" / "final") == straight


def test_other_rows_at_the_same_path_are_another_run_and_the_setting_is_named(tmp_path, half):
    with pytest.raises(RunError, match=r"the training rows have changed .*data\.system_prompt: None -> 'Be brief\.'"):
        train(case_config(tmp_path, *HALF, "data.system_prompt=Be brief."), resume=True, console=quiet())


@pytest.mark.parametrize("now", ["[{0}/one-answer.jsonl]", "[]", "[{0}/rows.jsonl#1]"])
def test_held_out_rows_are_part_of_a_run(tmp_path, now):
    train(case_config(tmp_path, *HALF, f"data.eval=[{INPUTS}/rows.jsonl]"), console=quiet())
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(RunError, match=r"the held-out rows have changed since the run was started \(data\.eval"):
        train(case_config(tmp_path, *HALF, f"data.eval={now.format(INPUTS)}"), resume=True, console=quiet())


def test_a_run_of_before_held_out_rows_counted_goes_on(tmp_path, half):
    run, straight = half
    identity = json.loads((run / "run.json").read_text())
    del identity["held_out"]
    (run / "run.json").write_text(json.dumps(identity))
    train(case_config(tmp_path, *HALF), resume=True, console=quiet())
    assert digest(run / "final") == straight


def test_which_rows_are_checked_may_change(tmp_path, half):
    """It changes nothing that is learned; a run of a version that did not know the setting goes on, too."""
    run, straight = half
    assert "labels.check" not in json.loads((run / "run.json").read_text())["settings"]
    train(case_config(tmp_path, *HALF, "labels.check=all"), resume=True, console=quiet())
    assert digest(run / "final") == straight
