"""Tasks, answers and the table: against models called directly, and against lm-evaluation-harness's own HFLM."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.config.teachers import TeacherConfig
from student_trainer.errors import ConfigError, DataError
from student_trainer.evaluation.tasks.choice_file import LETTERS, read_choices
from student_trainer.evaluation.tasks.engine import ServedEngine, StudentEngine
from student_trainer.evaluation.tasks.harness import load_tasks, run_tasks
from student_trainer.evaluation.tasks.lm import EngineLM
from student_trainer.inference.load import load, locate
from student_trainer.inference.prompts import Prompter
from student_trainer.inference.served import served_teacher
from student_trainer.teachers.connect import Connection
from tests.e2e.conftest import call_cli

QUIET = Console(quiet=True)
QUESTIONS = [
    {"id": i, "question": f" {'the cat 猫' if i % 3 else 'an old dog'} {i * i}?", "A": "a mat", "B": f"b {i}", "C": "dog, run", "D": "by", "answer": "ABCDDCBA"[i % 8]}
    for i in range(16)
]  # fmt: skip


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """C-Eval's own shape: a CSV with id and explanation columns."""
    path = tmp_path_factory.mktemp("exam") / "my_exam.csv"
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, [*QUESTIONS[0], "explanation"])
        rows.writeheader()
        rows.writerows([row | {"explanation": ""} for row in QUESTIONS])
    return path


def engine_of(folder, name="student"):
    student = load(locate(str(folder)))
    return StudentEngine(name, student, Prompter(student.tokenizer), batch_size=5)


@pytest.fixture
def teacher(served, model_factory):
    tokenizer = AutoTokenizer.from_pretrained(model_factory("qwen2", seed=5))
    connection = Connection.of(TeacherConfig(address=served), served)
    with served_teacher(connection, [("here", tokenizer)], QUIET) as found:
        yield ServedEngine("teacher", found)


def directly(folder, texts):
    """Oracle: of each (context, continuation) its float64 log-probability by the plain model, one sequence at a time, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for context, continuation in texts:
        before, whole = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        found.append(sum(float(logp[t - 1, whole[t]]) for t in range(len(before), len(whole))))
    return found


def prompt_of(row):
    """C-Eval's prompt, written down once more; lm-eval scores a choice behind a space (target_delimiter)."""
    choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
    return f"{row['question'].strip()}\n{choices}\n答案："


def accuracy_directly(folder):
    hits = 0
    for row in QUESTIONS:
        logp = directly(folder, [(prompt_of(row), f" {letter}") for letter in LETTERS])
        hits += "ABCD"[logp.index(max(logp))] == row["answer"]
    return hits / len(QUESTIONS)


def test_accuracy_of_a_local_file_is_that_of_a_direct_computation(exam, model_factory, teacher):
    """The student here, and the teacher by its server, against plain transformers in float32."""
    tasks = load_tasks([str(exam)], QUIET)
    seen = set()
    for seed in (0, 5):
        folder = model_factory("qwen2", seed=seed) if seed else model_factory("qwen2")
        found = run_tasks(tasks, engine_of(folder), QUIET)["my_exam"]
        assert (found["metric"], found["value"], found["samples"]) == ("acc", accuracy_directly(folder), 16)
        seen.add(found["value"])
    assert len(seen) > 1, "models that all answer alike show nothing"
    assert run_tasks(tasks, teacher, QUIET)["my_exam"]["value"] == found["value"]
    some = run_tasks(tasks, teacher, QUIET, limit=5)["my_exam"]
    assert some["samples"] == 5


def requests(kind, *arguments):
    return [Instance(kind, {}, one, number, metadata=("task", number, 1)) for number, one in enumerate(arguments)]


def test_students_and_teachers_say_what_hflm_says(model_factory, teacher):
    """lm-eval's own class over the same weights: likelihoods, greedy flags, rolling ones, and texts until a stop."""
    folder = model_factory("qwen2", seed=5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4, device="cpu")
    texts = [
        ("the cat", " sat on a mat"),
        ("", "猫 an old"),
        ("a mat \n", "b"),
        ("an old dog saw " * 3, "the"),
        ("x", "yz"),
    ]
    written = reference.generate_until(requests("generate_until", ("the cat", {"until": [], "max_gen_toks": 12})))[0]
    stop = written[4:6]
    told = [
        ("the cat", {"until": [stop, "\n\n"], "max_gen_toks": 12}),
        ("an old dog", {"until": [], "max_gen_toks": 7, "do_sample": False}),
    ]
    likely = reference.loglikelihood(requests("loglikelihood", *texts))
    texts.append(("the cat", written[:1]))
    likely = reference.loglikelihood(requests("loglikelihood", *texts))
    rolling = [("the cat sat on a mat",), ("猫 " * 100,)]
    rolled = reference.loglikelihood_rolling(requests("loglikelihood_rolling", *rolling))
    answers = reference.generate_until(requests("generate_until", *told))
    assert len(answers[0]) < len(written)
    for engine in (engine_of(folder), teacher):
        own = EngineLM(engine, QUIET)
        found = own.loglikelihood(requests("loglikelihood", *texts))
        assert [one[0] for one in found] == pytest.approx([one[0] for one in likely], abs=2e-3)
        assert [one[1] for one in found] == [bool(one[1]) for one in likely]
        long = own.loglikelihood_rolling(requests("loglikelihood_rolling", *rolling))
        assert long[0] == pytest.approx(rolled[0], abs=5e-3)
        # A server's limit counts the last token too, so its windows are one token shorter.
        assert long[1] == pytest.approx(rolled[1], abs=5e-3 if engine is not teacher else 20)
        assert own.generate_until(requests("generate_until", *told)) == answers


def test_chat_templates_are_those_of_training(model_factory):
    own = EngineLM(engine_of(model_factory("qwen2")), QUIET)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    expected = own.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert own.apply_chat_template(messages[:1]) == expected
    assert own.apply_chat_template(messages, add_generation_prompt=False).endswith("assistant\nsat")


@pytest.mark.parametrize("name", ["ceval-valid", "gsm8k"])
def test_a_hub_task_is_found_and_its_data_set_alone_is_missing(name, monkeypatch):
    """The task's own YAML is built by lm-eval; offline the load of its data set is what fails, in one line that names it."""
    data_set = {"ceval-valid": "ceval/ceval-exam", "gsm8k": "openai/gsm8k"}[name]
    with pytest.raises(
        DataError, match=rf"^task {name}: its data set {data_set} cannot be loaded here: \w+: .*HF_HOME"
    ) as told:
        load_tasks([name], QUIET)
    assert "\n" not in str(told.value)


def test_a_hub_task_is_lm_evals_own_once_its_data_set_is_there(model_factory, monkeypatch):
    """gsm8k as lm-eval defines it, with five shots, over a data set that stands in for the hub's: generation, filters and metrics are its own."""
    import datasets

    rows = [{"question": f"{i} cats?", "answer": f"so {i}\n#### {i}"} for i in range(6)]
    kept = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **rest: asked.append((path, name)) or kept)
    tasks = load_tasks(["gsm8k"], QUIET)
    assert asked == [("openai/gsm8k", "main")]
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.dump_config", lambda self: {}, raising=False)
    engine = engine_of(model_factory("qwen2"))
    engine.max_tokens = 100_000
    prompts = []
    monkeypatch.setattr(engine, "write", lambda some, sampling, until, done: prompts.append((len(some), sampling.max_new_tokens, until)) or [_Written("x #### 3")] * len(some))  # fmt: skip
    found = run_tasks(tasks, engine, QUIET)["gsm8k"]
    assert (found["metric"], found["samples"]) == ("exact_match", 6) and found["value"] == pytest.approx(1 / 6)
    assert prompts[0][0] == 6 and "Question:" in prompts[0][2]


class _Written:
    def __init__(self, text):
        self.text = text


def test_tasks_that_are_none_are_told(tmp_path):
    for name, told in (("cevl-valid", "did you mean ceval-valid"), ("/no/where.yaml", "no such file"), ("where.csv", "cannot be read")):  # fmt: skip
        with pytest.raises((ConfigError, DataError), match=told):
            load_tasks([name], QUIET)
    good = {"question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A"}
    for row, told in ((good | {"answer": "E"}, "letter of the right choice"), (good | {"C": ""}, "field=C"), ({"q": 1}, "field=question")):  # fmt: skip
        (tmp_path / "e.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(DataError, match=rf"e.jsonl:2: .*{told}"):
            read_choices(tmp_path / "e.jsonl")
    (tmp_path / "e.jsonl").write_text(json.dumps(good | {"answer": " b ", "A": 3}) + "\n")
    read = read_choices(tmp_path / "e.jsonl")
    assert read.rows[0]["answer"] == "B" and read.rows[0]["A"] == "3" and read.asks_by == "Answer:"


def test_a_local_yaml_is_a_task(tmp_path, model_factory):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"the {i}", "gold": i % 2}) + "\n" for i in range(6)))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}} cat:"\ndoc_to_choice: ["no", "yes"]\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}]\n"
    )
    found = run_tasks(load_tasks([str(tmp_path / "mine.yaml")], QUIET), engine_of(model_factory("qwen2")), QUIET)
    assert found["mine"]["metric"] == "acc" and found["mine"]["samples"] == 6


def test_one_table_for_before_after_and_teacher(tmp_path, run_folder, served, exam, rows_file, capsys, monkeypatch):
    """The command; and the same weights as student and teacher have the same figures, and no divergence."""
    out = tmp_path / "out"
    short = ("--answers", 3, "--max-new-tokens", 8, "--cache-dir", tmp_path / "cache", "--out", out)
    code, told = call_cli(capsys, monkeypatch, "evaluate", run_folder, "--teacher", served, "--rows", f"{rows_file}#6", "--tasks", exam, *short)  # fmt: skip
    assert code == 0, told
    found = json.loads((out / "evaluation.json").read_text())
    assert found["format"] == 1 and [one["name"] for one in found["models"]] == ["before", "after", "teacher"]
    before, after, teacher = (one["metrics"] for one in found["models"])
    assert (
        set(before)
        == set(after)
        == {"acc1", "acc3", "nll_per_byte", "nll_per_token", "kl_to_teacher", "avg_response_len", "cut_off"}
    )
    assert set(teacher) == set(before) and teacher["kl_to_teacher"] == 0 and before["kl_to_teacher"] > 0.01
    assert before["nll_per_byte"] != after["nll_per_byte"]
    for one in found["models"]:
        assert one["tasks"]["my_exam"]["samples"] == 16 and one["speed"]["decode_tokens_per_s"] > 0
        assert (one["speed"]["peak_memory_bytes"] is None) == (one["name"] == "teacher")
    assert [set(sample["answers"]) for sample in found["samples"]] == [{"before", "after", "teacher"}] * 3
    page = (out / "evaluation.md").read_text()
    assert f"| acc1 ↑ | {before['acc1']:.4f} | {after['acc1']:.4f} | {teacher['acc1']:.4f} |" in page


def test_a_student_that_is_its_own_teacher(tmp_path, model_factory, served, rows_file, capsys, monkeypatch):
    """Oracle of the teacher's column: the same weights loaded here."""
    folder = model_factory("qwen2", seed=5)
    code, told = call_cli(
        capsys, monkeypatch, "evaluate", folder, "--teacher", served, "--rows", f"{rows_file}#6", "--no-speed", "--answers", 4,
        "--max-new-tokens", 8, "--cache-dir", tmp_path / "cache", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, told
    student, teacher = (one["metrics"] for one in json.loads((tmp_path / "evaluation.json").read_text())["models"])
    assert student == pytest.approx(teacher, abs=1e-4)


def test_what_a_user_gets_wrong_is_one_line(tmp_path, run_folder, model_factory, rows_file, capsys, monkeypatch):
    folder = model_factory("qwen2")
    for arguments, line in (
        ((tmp_path / "gone",), "no such folder"),
        ((folder, "--no-speed"), "nothing to measure"),
        ((folder, "--teacher", "127.0.0.1:9", "--rows", rows_file, "--teacher-name", "x"), "127.0.0.1:9"),
        ((folder, "--rows", tmp_path / "gone.jsonl"), "no such file"),
        ((folder, "--tasks", "no-such-task-x"), "no task, group or tag"),
        ((folder, "--teacher-name", "x"), "belongs to --teacher"),
        ((f"a={folder}", f"a={folder}"), "two models are called 'a'"),
    ):
        code, told = call_cli(capsys, monkeypatch, "evaluate", *arguments)
        assert code == (75 if line == "127.0.0.1:9" else 2) and line in told and "Traceback" not in told, told
