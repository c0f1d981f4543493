"""Whole runs with several teachers behind the real wire: what is learned, who has labelled what, and what happens while one is away."""

import asyncio
import contextlib
import io
import json
import math
import subprocess
import threading
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from student_trainer.config.run import dump_config, parse_config
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import parse_source
from student_trainer.errors import ConfigError, TeacherAwayError
from student_trainer.labels.joined import lane
from student_trainer.labels.joined.ledger import TEACHERS_NAME
from student_trainer.labels.packing import pack
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.model.load import load_student
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.metrics import TIMED
from student_trainer.training.run import train
from teacher_wire.core.errors import LabelError
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.testing.loopback import LoopbackServer, serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.fake_process import start_fake
from tests.student_trainer.training.test_train import adapter_hash
from tests.students import run_student, start_student

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lane, "AWAY_S", 0.2)
    monkeypatch.setattr(lane, "PROBE_S", 0.05)


@pytest.fixture
def fakes(model_factory):
    return {name: fake_for(model_factory("qwen2"), seed=seed) for name, seed in (("a", 1), ("b", 2))}


class Mortal:
    """A teacher whose server goes down when it is asked for the answer after the first `answers`, or for one about a sequence of
    `too_long` tokens, which it never gives.
    """

    def __init__(self, fake: FakeTeacher, answers: float = math.inf, too_long: float = math.inf) -> None:
        self.fake = fake
        self.server = LoopbackServer(fake).start()
        self.dying = threading.Event()
        score = fake.score

        async def mortal(call):
            if fake.calls >= answers or call.batch.lengths_B.max() >= too_long:
                self.dying.set()
                await asyncio.sleep(3600)
            return await score(call)

        fake.score = mortal
        self._alive = score
        self._watch = threading.Thread(target=self._die, daemon=True)
        self._watch.start()

    def _die(self) -> None:
        self.dying.wait()
        self.server.stop()

    @property
    def address(self) -> str:
        return self.server.address

    def back(self) -> LoopbackServer:
        """A server on the same port, when the first one is down."""
        self.dying.wait(60)
        self._watch.join(60)
        self.fake.score = self._alive
        return LoopbackServer(self.fake, port=self.server.port).start()


def config_for(folder, model, rows, addresses, name="run", /, **sections):
    """A run of `a` and `b`, without held-out rows; teachers are given as the keys that differ."""
    own = sections.pop("own", {})
    teachers = [{"alias": alias, "address": address, **own.get(alias, {})} for alias, address in addresses.items()]
    where = {"output_dir": str(folder / name), "cache_dir": str(folder / f"{name}-cache")}
    sections = {"feed": {"max_batches": 2}, "loss": {"sft_weight": 0.1}, **sections}
    data = {"eval": [], **sections.pop("data", {})}
    tree = run_config(folder, model, rows, None, run=where, teachers=teachers, data=data, **sections)
    return parse_config(tree, "test")


def shown_console():
    return Console(file=io.StringIO(), width=400)


def entries(folder):
    return [json.loads(line) for line in (folder / TEACHERS_NAME).read_text().splitlines()]


def learned(folder):
    """The log without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    timed = (*TIMED, "wait_share.", "train_")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def samples_of(config):
    """The keys of each micro-batch of a run, from its rows and its seed alone."""
    student = load_student(config.model, config.run.seed)
    sources = [parse_source(str(source.path)) for source in config.data.train]
    data = build_dataset(sources, student.tokenizer, max_tokens=100)
    settings = config.train
    order = RunOrder(
        len(data), batch_size=settings.batch_size, accumulation=settings.accumulation, epochs=1,
        max_steps=settings.max_steps, seed=config.run.seed,
    )  # fmt: skip
    return [[data[index].example.key for index in order.batch(number)] for number in range(order.batches)]


def check_ledger(config, folder):
    """One line a micro-batch, in order, each sample of the run once; returns the lines."""
    found = entries(folder)
    expected = samples_of(config)
    assert [entry["batch"] for entry in found] == list(range(len(expected)))
    for entry, keys in zip(found, expected, strict=True):
        assert entry["step"] == entry["batch"] // config.train.accumulation
        assert sorted(key for group in entry["labelled"] for key in group["samples"]) == sorted(keys)
    return found


def test_the_first_loss_of_two_teachers_is_the_sum_of_their_shares(tmp_path, model_factory, rows_file, fakes):
    """Against all three models asked directly, without feed, wire or chunked loss."""
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        config = config_for(
            tmp_path, model_factory("qwen2"), rows_file, {"a": a.address, "b": b.address},
            own={"a": {"weight": 3.0}, "b": {"weight": 1.0}}, train={"max_steps": 1}, model={"lora": None},
            loss={"sft_weight": 0.0},
        )  # fmt: skip
        result = train(config, console=QUIET)
    student = load_student(config.model, config.run.seed)
    data = build_dataset([parse_source(str(rows_file))], student.tokenizer, max_tokens=100)
    order = RunOrder(len(data), batch_size=2, accumulation=2, epochs=1, max_steps=1, seed=config.run.seed)
    vocab, rows, sums = len(student.tokenizer), 0, {"a": 0.0, "b": 0.0}
    for index in [i for number in range(2) for i in order.batch(number)]:
        packed = pack([data[index].example]).batch
        with torch.no_grad():
            states = student.model(torch.from_numpy(packed.token_ids_T).long()[None]).logits[
                0, packed.rows_of(), :vocab
            ]
        q = states.double().log_softmax(-1)
        rows += packed.rows
        for name, fake in fakes.items():
            p = (
                torch.from_numpy(fake.signals(spec_of("full", vocab), packed)["logits_NV"].array)
                .double()
                .log_softmax(-1)
            )
            sums[name] += float((p.exp() * (p - q)).sum())
    entry = learned(result.output_dir)[0]
    assert entry["loss"] == pytest.approx((0.75 * sums["a"] + 0.25 * sums["b"]) / rows, rel=1e-4)
    assert entry["kd_loss"] == pytest.approx(entry["loss"], rel=1e-6)
    for name in fakes:
        assert entry[f"kd_loss.{name}"] == pytest.approx(sums[name] / rows, rel=1e-4)
        assert entry[f"coverage.{name}"] == 1.0 and 0 <= entry[f"agreement.{name}"] <= 1
    check_ledger(config, result.output_dir)


def test_a_list_of_one_is_the_section_teacher(tmp_path, model_factory, rows_file, fakes):
    runs = []
    with serve(fakes["a"]) as a:
        for name, sections in (
            ("section", {"teacher": {"address": a.address}}),
            ("list", {"teachers": [{"address": a.address}]}),
            ("policy", {"teachers": [{"address": a.address, "alias": "a"}], "when_missing": "fail"}),
        ):
            where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / f"{name}-cache")}
            tree = run_config(tmp_path, model_factory("qwen2"), rows_file, None, run=where, **sections)
            runs.append(train(parse_config(tree, "test"), console=QUIET).output_dir)
    assert len({adapter_hash(folder) for folder in runs}) == 1
    assert learned(runs[0]) == learned(runs[1]) == learned(runs[2])


def test_rows_go_to_the_teachers_of_their_tags(tmp_path, model_factory, rows_file, fakes):
    """`a` is asked about rows of math, `b` about all: each row of a line of the ledger is where its tag says."""
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        lines = rows_file.read_text().splitlines()
        rows = tmp_path / "tagged.jsonl"
        rows.write_text(
            "".join(
                json.dumps({**json.loads(line), "kind": ["math", "prose"][n % 2]}) + "\n"
                for n, line in enumerate(lines)
            )
        )
        config = config_for(
            tmp_path, model_factory("qwen2"), rows, {"a": a.address, "b": b.address},
            own={"a": {"tags": ["math"]}}, data={"tag_field": "kind"},
        )  # fmt: skip
        result = train(config, console=QUIET)
    groups = [group for entry in check_ledger(config, result.output_dir) for group in entry["labelled"]]
    assert {tuple(group["by"]) for group in groups} == {("a", "b"), ("b",)}
    for group in groups:
        is_math = [int(key.rsplit(":")[-1]) % 2 == 1 for key in group["samples"]]
        assert all(is_math) if group["by"] == ["a", "b"] else not any(is_math)
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert all(entry["coverage.b"] == 1.0 for entry in log)
    assert 0 < sum(entry["coverage.a"] for entry in log) < len(log)


def test_each_row_has_one_teacher_when_they_are_routed(tmp_path, model_factory, rows_file, fakes):
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        rows = tmp_path / "tagged.jsonl"
        lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
        rows.write_text(
            "".join(json.dumps({**row, "kind": "math" if n % 3 else ""}) + "\n" for n, row in enumerate(lines))
        )
        config = config_for(
            tmp_path, model_factory("qwen2"), rows, {"a": a.address, "b": b.address},
            own={"a": {"tags": ["math"]}}, data={"tag_field": "kind"}, combine="route",
        )  # fmt: skip
        result = train(config, console=QUIET)
    for entry in check_ledger(config, result.output_dir):
        for group in entry["labelled"]:
            for key in group["samples"]:
                assert group["by"] == (["a"] if (int(key.rsplit(":")[-1]) - 1) % 3 else ["b"])
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert all(entry["coverage.a"] + entry["coverage.b"] == pytest.approx(1.0) for entry in log)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_factory, rows_file):
    """The adapter of the run whose teachers both stay."""
    model, folder = model_factory("qwen2"), tmp_path_factory.mktemp("undisturbed")
    with serve(fake_for(model, seed=1)) as a, serve(fake_for(model, seed=2)) as b:
        config = config_for(folder, model, rows_file, {"a": a.address, "b": b.address})
        result = train(config, console=QUIET)
    assert all(
        len(group["by"]) == 2 for entry in check_ledger(config, result.output_dir) for group in entry["labelled"]
    )
    return adapter_hash(result.output_dir)


def test_reweight_finishes_and_says_how_many_samples_had_one_teacher(tmp_path, model_factory, rows_file, fakes):
    mortal, shown = Mortal(fakes["b"], 8), shown_console()
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": mortal.address}
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, addresses, when_missing="reweight")
        result = train(config, console=shown)
    groups = [group for entry in check_ledger(config, result.output_dir) for group in entry["labelled"]]
    fewer = [group for group in groups if group["by"] == ["a"]]
    assert fewer and all(group["missing"] == ["b"] for group in fewer)
    assert all(group["by"] == ["a", "b"] and "missing" not in group for group in groups if group not in fewer)
    count = sum(len(group["samples"]) for group in fewer)
    assert f"{count} of 24 samples were learned from with fewer teachers: {count} without 'b'" in shown.file.getvalue()
    assert shown.file.getvalue().count("'b' is away") == 1 and "is back after" not in shown.file.getvalue()
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert log[0]["coverage.b"] == 1.0 and log[-1]["coverage.b"] == 0.0 and log[-1]["coverage.a"] == 1.0
    assert log[-1]["kd_loss"] == pytest.approx(log[-1]["kd_loss.a"], rel=1e-5), "its share is the whole"


def test_who_is_back_is_used_again_without_a_restart(tmp_path, model_factory, rows_file, fakes):
    mortal, shown = Mortal(fakes["b"], 8), shown_console()
    returned, score = threading.Event(), fakes["a"].score

    async def patient(call):  # `a` holds the run up until `b` is there again, or it would be over
        if fakes["a"].calls >= 20:
            await asyncio.to_thread(returned.wait, 60)
        return await score(call)

    fakes["a"].score = patient
    servers = []

    def bring_back():
        while "is away" not in shown.file.getvalue():
            mortal.dying.wait(0.05)
        servers.append(mortal.back())
        while "is back after" not in shown.file.getvalue():
            mortal.dying.wait(0.05)
            threading.Event().wait(0.01)
        returned.set()

    thread = threading.Thread(target=bring_back, daemon=True)
    thread.start()
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": mortal.address}
        train_section = {"max_steps": 20}
        config = config_for(
            tmp_path, model_factory("qwen2"), rows_file, addresses, when_missing="reweight", train=train_section
        )
        result = train(config, console=shown)
    thread.join(60)
    servers[0].stop()
    found = check_ledger(config, result.output_dir)
    assert [group["by"] for group in found[-1]["labelled"]] == [["a", "b"]]
    assert any(group["by"] == ["a"] for entry in found for group in entry["labelled"])
    assert shown.file.getvalue().count("is away") == shown.file.getvalue().count("is back after") == 1


def test_wait_goes_on_when_it_is_back_as_if_nothing_had_been(tmp_path, model_factory, rows_file, fakes, undisturbed):
    mortal, servers = Mortal(fakes["b"], 8), []
    thread = threading.Thread(target=lambda: servers.append(mortal.back()), daemon=True)
    thread.start()
    with serve(fakes["a"]) as a:
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, {"a": a.address, "b": mortal.address})
        result = train(config, console=QUIET)
    thread.join(60)
    servers[0].stop()
    assert adapter_hash(result.output_dir) == undisturbed
    assert all(
        len(group["by"]) == 2 for entry in check_ledger(config, result.output_dir) for group in entry["labelled"]
    )


@pytest.mark.parametrize(
    ("policy", "retry_s", "save_steps"), [("fail", 300.0, 0), ("fail", 300.0, 2), ("wait", 0.5, 0)]
)
def test_who_cannot_be_waited_for_ends_the_run_which_goes_on_later(
    tmp_path, model_factory, rows_file, fakes, undisturbed, policy, retry_s, save_steps
):
    mortal = Mortal(fakes["b"], 10)
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": mortal.address}
        settings = {"own": {"b": {"retry_s": retry_s, "when_missing": policy}}, "train": {"save_steps": save_steps}}
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, addresses, **settings)
        with pytest.raises(TeacherAwayError, match="'b' has not answered") as caught:
            train(config, console=QUIET)
        assert caught.value.exit_code == 75
        folder = config.run.output_dir
        kept = checkpoint.newest_whole(folder)
        assert kept is not None and 0 < checkpoint.step_of(kept) < 6
        assert any(kept.name in note for note in caught.value.__notes__)
        last = [entry["step"] for entry in learned(folder) if "loss" in entry][-1]
        assert checkpoint.step_of(kept) == last, "it is of the last whole step"
        again = mortal.back()
        result = train(config, resume=True, console=QUIET)
        again.stop()
    assert adapter_hash(result.output_dir) == undisturbed
    check_ledger(config, folder)
    assert [entry["step"] for entry in learned(folder) if "loss" in entry] == list(range(1, 7))


def test_who_is_away_before_the_first_step_leaves_no_folder(tmp_path, model_factory, rows_file, fakes):
    mortal = Mortal(fakes["b"], 1)  # the one request of the trial
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": mortal.address}
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, addresses, when_missing="fail")
        with pytest.raises(TeacherAwayError) as caught:
            train(config, console=QUIET)
    assert any("nothing was learned yet" in note for note in caught.value.__notes__)
    assert not config.run.output_dir.exists()


@pytest.mark.parametrize(
    ("mistake", "error"), [("nan", LabelError), ("foreign", LabelError), ("state", TeacherHeadMismatch)]
)
def test_a_wrong_answer_of_one_ends_the_run_under_every_policy(
    tmp_path, model_factory, rows_file, fakes, mistake, error
):
    score = fakes["b"].score

    async def mistaken(call):
        fakes["b"].mistake = mistake if fakes["b"].calls >= 4 else ""
        return await score(call)

    fakes["b"].score = mistaken
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        addresses = {"a": a.address, "b": b.address}
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, addresses, when_missing="reweight")
        with pytest.raises(error) as caught:
            train(config, console=QUIET)
    said = f"{caught.value} {caught.value.__notes__}"
    assert "rows.jsonl:" in said and ("teacher b" in said or "'b'" in said)


def test_ten_teachers_finish(tmp_path, model_factory, rows_file):
    """More teachers than the loop has threads; every sample has all of them."""
    fakes = {f"t{n}": fake_for(model_factory("qwen2"), seed=n) for n in range(10)}
    with contextlib.ExitStack() as stack:
        addresses = {name: stack.enter_context(serve(fake)).address for name, fake in fakes.items()}
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, addresses, feed={"max_batches": 10})
        result = train(config, console=QUIET)
    for entry in check_ledger(config, result.output_dir):
        assert [group["by"] for group in entry["labelled"]] == [list(fakes)]


@pytest.mark.parametrize("combine", ["prob_mix", "confidence"])
def test_other_ways_to_combine_learn(tmp_path, model_factory, rows_file, fakes, combine):
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        addresses = {"a": a.address, "b": b.address}
        config = config_for(
            tmp_path,
            model_factory("qwen2"),
            rows_file,
            addresses,
            "run",
            combine=combine,
            train={"max_steps": 12, "learning_rate": 5e-3},
        )
        result = train(config, console=QUIET)
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert log[-1]["kd_loss"] < log[0]["kd_loss"]


def test_a_killed_process_ends_the_command_with_code_3_and_the_run_goes_on(
    tmp_path, model_factory, rows_file, fakes, undisturbed
):
    """The real commands against a teacher in a process that is killed without a word."""
    process, port = start_fake(replace_delay(fakes["b"], 0.15))
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": f"127.0.0.1:{port}"}
        config = config_for(
            tmp_path, model_factory("qwen2"), rows_file, addresses, when_missing="fail", feed={"max_batches": 1}
        )
        file = tmp_path / "config.yaml"
        file.write_text(dump_config(config))
        command = start_student("train", file, stderr=subprocess.PIPE)
        log = config.run.output_dir / "train_log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        _, said = command.communicate(timeout=120)
        assert command.wait() == 75
        (line,) = [line for line in said.splitlines() if line.startswith("student-trainer: ")]
        assert "teacher 'b' has not answered (when_missing=fail)" in line and "--resume (from checkpoint-" in line
        again, _ = start_fake(fakes["b"], port)
        done = run_student("train", file, "--resume", "auto")
        again.kill()
        again.wait()
        assert done.returncode == 0, done.stderr
    assert adapter_hash(config.run.output_dir) == undisturbed
    check_ledger(config, config.run.output_dir)


def test_a_field_of_tags_that_no_row_has_is_refused(tmp_path, model_factory, rows_file, fakes):
    """Misspelt, it would give the rows of one teacher to another."""
    rows = tmp_path / "tagged.jsonl"
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows.write_text("".join(json.dumps({**row, "topic": "math"}) + "\n" for row in lines))
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        for field, said in (("topci", "did you mean topic"), ("zzz", "the rows have ")):
            config = config_for(
                tmp_path, model_factory("qwen2"), rows, {"a": a.address, "b": b.address},
                own={"a": {"tags": ["math"]}, "b": {"tags": ["all"]}},
                data={"tag_field": field, "train": [{"path": str(rows), "tags": ["all"]}]},
            )  # fmt: skip
            for _ in ("new", "kept"):  # the second time from the kept tokens
                with pytest.raises(ConfigError, match=f"data.tag_field={field}: no row of data.train has .*{said}"):
                    train(config, console=QUIET)


def replace_delay(fake, delay_s):
    fake = replace(fake)
    fake.delay_s = delay_s
    return fake


def test_rollouts_are_labelled_by_the_teachers_of_their_rows(tmp_path, model_factory, rows_file, fakes):
    """On-policy samples keep the tags of the rows whose prompts they answer."""
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        rows = tmp_path / "tagged.jsonl"
        lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
        rows.write_text(
            "".join(json.dumps({**row, "kind": "math" if n % 3 else ""}) + "\n" for n, row in enumerate(lines))
        )
        config = config_for(
            tmp_path, model_factory("qwen2"), rows, {"a": a.address, "b": b.address}, own={"a": {"tags": ["math"]}},
            data={"tag_field": "kind"}, model={"compiled": False},
            on_policy={"share": 1.0, "max_new_tokens": 5, "max_staleness": 0},
        )  # fmt: skip
        result = train(config, console=QUIET)
    groups = [group for entry in entries(result.output_dir) for group in entry["labelled"]]
    assert sum(len(group["samples"]) for group in groups) == 24
    for group in groups:
        for key in group["samples"]:
            row = int(key.split("[rollout")[0].rsplit(":")[-1]) - 1
            assert "[rollout" in key and group["by"] == (["a", "b"] if row % 3 else ["b"])
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert all(entry["coverage.b"] == 1.0 and entry["on_policy_share"] == 1.0 for entry in log)


def test_layers_are_those_of_the_teacher_that_is_named(tmp_path, model_factory, rows_file):
    fakes = {name: fake_for(model_factory("qwen2"), seed=seed, layers=4) for name, seed in (("a", 1), ("b", 2))}
    with serve(fakes["a"]) as a, serve(fakes["b"]) as b:
        own = {"b": {"tags": ["math"]}}
        rows = tmp_path / "tagged.jsonl"
        lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
        rows.write_text(
            "".join(json.dumps({**row, "kind": "math" if n % 3 else ""}) + "\n" for n, row in enumerate(lines))
        )
        hidden = {"weight": 1.0, "layers": [1, 2], "reduction": "none", "teacher": "b"}
        config = config_for(
            tmp_path, model_factory("qwen2"), rows, {"a": a.address, "b": b.address}, own=own, data={"tag_field": "kind"},
            loss={"hidden": hidden},
        )  # fmt: skip
        result = train(config, console=QUIET)
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert log[-1]["hidden_loss"] < log[0]["hidden_loss"]
    assert (result.output_dir / "layers.json").is_file()


@pytest.mark.parametrize("policy", ["reweight", "fail"])
def test_who_is_away_when_held_out_rows_are_measured(tmp_path, model_factory, rows_file, fakes, policy):
    """Under `reweight` its figure alone is missing; else the run ends with a checkpoint of the step that it was measured after."""
    rows = tmp_path / "long.jsonl"
    long = {"instruction": "Go on.", "input": "the cat sat on a mat " * 4, "output": "and saw an old dog"}
    rows.write_text((json.dumps(long) + "\n") * 3)
    mortal, shown = Mortal(fakes["b"], too_long=50), shown_console()
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": mortal.address}
        settings = {"eval_steps": 4, "save_steps": 0}
        config = config_for(
            tmp_path, model_factory("qwen2"), rows_file, addresses, when_missing=policy,
            data={"eval": [str(rows)]}, train=settings,
        )  # fmt: skip
        if policy == "fail":
            with pytest.raises(TeacherAwayError) as caught:
                train(config, console=shown)
            assert any("from checkpoint-4" in note for note in caught.value.__notes__)
            again = mortal.back()
            result = train(config, resume=True, console=QUIET)
            again.stop()
            assert result.metrics["kl_to_a"] > 0 and result.metrics["kl_to_b"] > 0
            return
        result = train(config, console=shown)
    assert result.metrics["kl_to_a"] > 0 and "kl_to_b" not in result.metrics
    assert "kl_to_b is not measured this time" in shown.file.getvalue()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"labels": {"transport": "top_k", "k": 8, "extra_ids": 4}}, "labels.extra_ids=4 of teacher 'a'"),
        ({"on_policy": {"share": 0.0, "publish": {"every": 2, "teacher": "fake"}}}, "on_policy.publish"),
    ],
)
def test_what_is_for_the_section_teacher_is_refused_of_a_list_of_one_too(
    tmp_path, model_factory, rows_file, fakes, sections, said
):
    """A list of one with another policy has the feed of several."""
    with serve(fakes["a"]) as a:
        config = config_for(
            tmp_path, model_factory("qwen2"), rows_file, {"a": a.address}, when_missing="fail", **sections
        )
        with pytest.raises(ConfigError, match=said):
            train(config, console=QUIET)
    assert not config.run.output_dir.exists()


def test_a_teacher_of_another_tokenizer_goes_away_like_any_other(tmp_path, model_factory, rows_file, fakes):
    reader = FakeTokenizer((b"the ", b" the", b"an", b"er", b"is", b"12", b"."))
    mortal, shown = Mortal(FakeTeacher(vocab_rows=len(reader), hidden_size=16, reader=reader), 3), shown_console()
    with serve(fakes["a"]) as a:
        addresses = {"a": a.address, "b": mortal.address}
        own = {"b": {"cross_tokenizer": {"min_coverage": 0.4}, "labels": "top_k", "weight": 2.0}}
        config = config_for(tmp_path, model_factory("qwen2"), rows_file, addresses, own=own, when_missing="reweight")
        result = train(config, console=shown)
    groups = [group for entry in check_ledger(config, result.output_dir) for group in entry["labelled"]]
    kinds = {(tuple(group["by"]), tuple(group.get("missing", ()))) for group in groups}
    assert kinds == {(("a", "b"), ()), (("a",), ()), (("a",), ("b",))}, "some rows are too unlike for it"
    log = [entry for entry in learned(result.output_dir) if "kd_loss" in entry]
    assert max(entry["coverage.b"] for entry in log) > 0
    assert all(entry["alm_loss.b"] >= 0 for entry in log)
    assert "fewer teachers" in shown.file.getvalue()
