"""Whole runs with labels on disk: computed once for all runs of a machine, the same bits for all of them; and the commands."""

import hashlib
import io
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from rich.console import Console

from student_trainer.cli import main
from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from teacher_wire.core.errors import LabelError, ServerError
from teacher_wire.labels.store import LabelStore
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.training.test_train import QUIET, adapter_hash, losses
from tests.students import start_student
from tests.teacher_wire.labels.labels_of import SPECS, entry_of, key_of
from tests.teacher_wire.labels.test_store_processes import small_disk


class FickleTeacher(FakeTeacher):
    """Its states differ in their last bits whenever it is asked."""

    def states(self, batch):
        return super().states(batch) * np.float32(1 + 1e-6 * self.calls)


def fickle_for(folder):
    fake = fake_for(folder)
    return FickleTeacher(
        vocab_rows=fake.vocab_rows,
        hidden_size=fake.hidden_size,
        tokenizer_sha256=fake.tokenizer_sha256,
        chat_template_sha256=fake.chat_template_sha256,
    )


@pytest.fixture
def run_of(tmp_path, config_of):
    """Name of a run and sections -> its config; all share one cache."""

    def build(name, **sections):
        return config_of(run={"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}, **sections)

    return build


def shown():
    return Console(file=io.StringIO(), width=300)


def files_of(folder):
    return sorted((folder / "cache" / "labels").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "labels",
    [{"transport": "hidden"}, {"transport": "top_k", "k": 12}, {"transport": "auto"}],
    ids=["hidden", "top_k", "auto"],
)
def test_a_second_run_asks_the_teacher_nothing(run_of, fake, labels):
    """Trial, training, evaluation: all from disk, and the same run to the last bit."""
    sections = {"labels": labels, "train": {"eval_steps": 3}}
    first = train(run_of("first", **sections), console=QUIET)
    calls, tokens = fake.calls, fake.tokens
    console = shown()
    second = train(run_of("second", **sections), console=console)
    asked = 1 if labels["transport"] == "auto" else 0  # measuring the link
    assert fake.calls - calls == asked, "no request at all"
    assert adapter_hash(first.output_dir) == adapter_hash(second.output_dir)
    assert losses(first.output_dir) == losses(second.output_dir)
    hits = [entry["cache_hits"] for entry in second.curve if "cache_hits" in entry]
    assert len(hits) == 6 and set(hits) == {1.0} and "labels from disk 100%" in console.file.getvalue()
    assert (second.usage.teacher_tokens > 0) == bool(asked) and second.usage.disk_tokens > 0
    assert first.usage.teacher_tokens == tokens > 0


def test_labels_by_named_ids_are_not_kept(run_of, fake, tmp_path):
    """The student names other ids at the next step: nothing of it is ever asked again."""
    sections = {"labels": {"transport": "top_k", "k": 12, "extra_ids": 4}, "data": {"eval": []}}
    first = train(run_of("first", **sections), console=QUIET)
    assert not files_of(tmp_path) and first.usage.disk_tokens == 0 < first.usage.teacher_tokens
    second = train(run_of("second", **sections), console=QUIET)
    assert losses(first.output_dir) == losses(second.output_dir)


def test_the_cache_can_be_left_out(run_of, fake, tmp_path):
    first = train(run_of("first", cache={"labels": False}), console=QUIET)
    calls = fake.calls
    second = train(run_of("second", cache={"labels": False}), console=QUIET)
    assert fake.calls == 2 * calls and not files_of(tmp_path)
    assert losses(first.output_dir) == losses(second.output_dir)
    assert second.curve[0]["cache_hits"] == 0.0 and second.usage.disk_tokens == 0


def test_a_run_may_be_resumed_with_another_cache(run_of, tmp_path):
    """Where labels come from is not what a run computes."""
    config = run_of("first")
    train(config, console=QUIET)
    (config.run.output_dir / "result.json").unlink()
    train(run_of("first", cache={"labels": False, "max_gb": 1.5}), resume=True, console=QUIET)


class _Stop(Exception):
    """Stands for a kill between two steps."""


def test_a_resumed_run_is_the_uninterrupted_one_though_the_teacher_is_fickle(
    tmp_path, model_factory, rows_file, monkeypatch
):
    model, fake = model_factory("qwen2"), fickle_for(model_factory("qwen2"))
    steps = {"max_steps": 8, "save_steps": 2, "log_steps": 1, "eval_steps": 4, "batch_size": 2, "accumulation": 2}

    def config_of(name, **sections):
        run = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
        tree = run_config(tmp_path, model, rows_file, server.address, run=run, train=steps, **sections)
        return parse_config(tree, "test")

    original = DistillationTrainer.compute_loss

    def dying(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Stop
        return original(self, *args, **kwargs)

    with serve(fake) as server:
        monkeypatch.setattr(DistillationTrainer, "compute_loss", dying)
        with pytest.raises(_Stop):
            train(config_of("broken"), console=QUIET)
        monkeypatch.setattr(DistillationTrainer, "compute_loss", original)
        train(config_of("broken"), resume=True, console=QUIET)
        train(config_of("straight"), console=QUIET)
        loose = [train(config_of(f"loose{i}", cache={"labels": False}), console=QUIET).output_dir for i in range(2)]
    assert adapter_hash(tmp_path / "broken") == adapter_hash(tmp_path / "straight")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert adapter_hash(loose[0]) != adapter_hash(loose[1]), "it is fickle indeed"


def test_labelled_ahead_the_teacher_may_go_away(run_of, fake):
    """It must only say who it is."""
    filled = label(run_of("run"), QUIET)
    tokens, calls = fake.tokens, fake.calls
    assert filled.usage.teacher_tokens <= tokens and filled.usage.sequences > 0 and filled.bytes > 0
    fake.mistake = "crash"
    config = run_of("run", train={"eval_steps": 3})
    result = train(config, console=QUIET)
    assert fake.calls == calls and result.usage.teacher_tokens == 0
    with pytest.raises(ServerError):
        train(run_of("other", cache={"labels": False}), console=QUIET)


def test_labelling_again_asks_for_what_is_missing_and_for_nothing_twice(run_of, fake, tmp_path, rows_file):
    config = run_of("run", train={"max_steps": None, "epochs": 2, "batch_size": 5})
    filled = label(config, QUIET)
    unique = len(files_of(tmp_path))
    assert filled.usage.sequences == unique <= 48, "each distinct sequence once, whatever the epochs"
    tokens, size = fake.tokens, sum(path.stat().st_size for path in files_of(tmp_path))
    assert filled.bytes >= size
    again = label(config, QUIET)
    assert fake.tokens == tokens and again.usage.disk_share == 1.0 and again.bytes == size
    for path in files_of(tmp_path)[:3]:
        path.unlink()
    third = label(config, QUIET)
    assert third.usage.teacher_sequences == 3 and len(files_of(tmp_path)) == unique


def test_labels_found_wrong_by_the_loss_do_not_stay_on_disk(run_of, fake, tmp_path):
    """`hidden` labels show what they are only under the teacher's head: by then they have been kept."""
    train(run_of("before", train={"max_steps": 1}), console=QUIET)
    fake.mistake = "state"
    with pytest.raises(LabelError) as caught:
        train(run_of("bad"), console=QUIET)
    assert "were deleted from" in " ".join(caught.value.__notes__)
    fake.mistake = ""
    train(run_of("good"), console=QUIET)


def test_a_full_disk_is_one_warning_and_the_run_goes_on(run_of, fake, tmp_path):
    console = shown()
    with small_disk(tmp_path / "cache", "128k"):
        result = train(run_of("full"), console=console)
    text = console.file.getvalue()
    assert text.count("cache:") == 1 and text.count("No space left") == 1, text
    assert result.steps == 6
    clean = train(run_of("clean", cache={"labels": False}), console=QUIET)
    assert losses(clean.output_dir) == losses(result.output_dir)


def test_labels_above_the_budget_are_said_before_the_run(run_of):
    console = shown()
    train(run_of("run", cache={"max_gb": 1e-5}), console=console)
    assert "above cache.max_gb=1e-05" in console.file.getvalue()
    with pytest.raises(ConfigError, match=r"cache\.max_gb=1e-05: the labels of this run"):
        label(run_of("run", cache={"max_gb": 1e-5}), QUIET)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"cache": {"labels": False}}, r"cache\.labels=false"),
        ({"labels": {"transport": "top_k", "k": 8, "extra_ids": 2}}, r"labels\.extra_ids=2"),
        ({"labels": {"transport": "auto"}}, r"labels\.transport=auto"),
        ({"teacher": None, "loss": {"output": None, "sft_weight": 1.0}}, "needs a teacher"),
        ({"loss": {"output": None, "sft_weight": 1.0}, "data": {"eval": []}}, "needs no labels"),
        ({"cache": {"max_gb": 0}}, r"cache\.max_gb"),
        ({"labels": {"transport": "top_k"}, "loss": {"output": {"temperature": 2.0}}}, "tempered_head"),
    ],
)
def test_what_cannot_be_labelled_ahead_is_refused(run_of, fake, sections, named):
    with pytest.raises(ConfigError, match=named):
        label(run_of("run", **sections), QUIET)
    assert fake.calls == 0


# ----------------------------------------------------------------------- commands, as a user types them


@pytest.fixture
def config_file(tmp_path, model_factory, rows_file, server):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path, model_factory("qwen2"), rows_file, server.address)))
    return path


@pytest.fixture
def call(capsys, monkeypatch):
    """Arguments -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["student-trainer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_label_train_and_look_after_the_cache(call, config_file, fake, tmp_path):
    cache = ("--cache-dir", tmp_path / "cache")
    code, _, err = call("label", config_file)
    assert code == 0 and "done labels of" in err and "labels 100%" in err, err
    assert "; 0% of the sequences were there before" in err, "the one that was tried first is no old one"
    calls = fake.calls
    code, _, err = call("label", config_file)
    assert code == 0 and "100% of the sequences were there before" in err and fake.calls == calls
    odd = tmp_path / "[/b]run"  # a name is text, and no markup of the console
    code, _, err = call("train", config_file, f"run.output_dir={odd}")
    assert code == 0 and "tokens from disk, 0 from the teacher" in err and fake.calls == calls, err
    assert f"model: {odd}/final" in err
    odd.rename(tmp_path / "run")
    code, out, _ = call("cache", "stats", *cache)
    count = len(files_of(tmp_path))
    assert code == 0 and fake.teacher_info().fingerprint[:16] in out and "hidden" in out and f" {count} " in out
    code, out, _ = call("cache", "export", tmp_path / "usb", *cache)
    assert code == 0 and f"copied {count} sequences" in out
    code, out, _ = call("cache", "verify", *cache)
    assert code == 0 and f"{count} sequences" in out and "0 sequences (0.0 MB) were damaged" in out
    files_of(tmp_path)[0].write_bytes(b"torn")
    code, out, _ = call("cache", "stats", *cache)
    assert code == 0 and "1 files are damaged" in out
    code, out, _ = call("cache", "verify", *cache)
    assert code == 1 and "1 sequences" in out
    code, out, _ = call("cache", "prune", "--teacher", fake.teacher_info().fingerprint[:8], "--dry-run", *cache)
    assert (
        code == 0 and "would free" in out and f"{count - 1} sequences" in out and len(files_of(tmp_path)) == count - 1
    )
    code, out, _ = call("cache", "prune", "--older-than-days", "1", *cache)
    assert code == 0 and "freed 0.0 MB: 0 sequences" in out
    code, out, _ = call("cache", "prune", "--max-gb", "0", *cache)
    assert code == 0 and not files_of(tmp_path)
    code, out, _ = call("cache", "stats", *cache)
    assert code == 0 and "no labels in" in out
    # on the other machine
    (tmp_path / "run" / "final").rename(tmp_path / "kept")
    code, _, err = call(
        "train", config_file, f"run.cache_dir={tmp_path / 'usb'}", f"run.output_dir={tmp_path / 'there'}"
    )
    assert code == 0 and "0 from the teacher" in err and fake.calls == calls
    name = "adapter_model.safetensors"
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for folder in (tmp_path / "kept", tmp_path / "there" / "final")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["cache", "prune"], "--max-gb"),
        (["cache", "prune", "--teacher", "nobody"], "nobody"),
        (["cache", "export", "{cache}"], "the cache itself"),
        (["cache", "export", "/proc/nowhere"], "/proc/nowhere"),
        (["cache", "stats", "--cache-dir", "{file}"], "not a folder"),
        (["label", "/no/such.yaml"], "/no/such.yaml"),
        (["label", "{config}", "teacher.address=127.0.0.1:1", "teacher.wait_s=0"], "127.0.0.1:1"),
        (["label", "{config}", "model.path=/no/such/model"], "/no/such/model"),
    ],
)
def test_wrong_input_is_one_line(call, config_file, tmp_path, arguments, named):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "labels").write_text("")
    entry = entry_of(SPECS["hidden"])
    LabelStore(tmp_path / "cache" / "labels").keep(
        key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals
    )
    places = {"cache": tmp_path / "cache", "file": tmp_path / "file", "config": config_file}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] == "cache" and "--cache-dir" not in arguments:
        arguments += ["--cache-dir", str(tmp_path / "cache")]
    code, _, err = call(*arguments)
    last = err.strip().splitlines()[-1]
    assert code == (75 if named == "127.0.0.1:1" else 2), err  # who does not answer now may do so later
    assert last.startswith("student-trainer: ") and named in last and "Traceback" not in err, err


def test_the_cache_commands_load_no_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['x', 'cache', 'stats', '--cache-dir', sys.argv[1]]\n"
        "from student_trainer.cli.main import main\n"
        "import contextlib\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "no labels in" in done.stdout and done.stdout.strip().endswith("[]")


def test_ctrl_c_keeps_what_came_and_says_how_to_go_on(config_file, fake, tmp_path):
    fake.delay_s = 0.3
    process = start_student("label", config_file, "feed.max_batches=1", stderr=subprocess.PIPE)
    while process.poll() is None and fake.calls < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"go on with: student-trainer label {config_file}" in err, err
    assert "Traceback" not in err
    there = len(files_of(tmp_path))
    assert there >= 4
    fake.delay_s = 0.0
    before = fake.calls
    filled = label(parse_config(yaml.safe_load(config_file.read_text()), "test"), QUIET)
    assert filled.usage.disk_sequences >= there and fake.calls > before
