"""`student-trainer traces` against a fake teacher on the real wire: right traces kept, planted faults quarantined by reason,
resumption without a trace twice, and a stop when the teacher is not worth it."""

import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

from student_trainer.config.data import SourceConfig
from student_trainer.config.files import parse_as
from student_trainer.config.traces import TracesConfig
from student_trainer.data.inputs import source_of
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import read_source
from student_trainer.data.trace_rows import TraceTasks, task_rows
from student_trainer.data.trace_schema import REASONS, parse
from student_trainer.errors import ConfigError, DataError, RunError
from student_trainer.traces.advice import advice
from student_trainer.traces.asking import groups as _groups
from student_trainer.traces.folder import Stats
from student_trainer.traces.questions import encode_questions, read_questions
from student_trainer.traces.run import make_traces
from student_trainer.traces.token_spans import mean_probability, token_spans, value_spans
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError, ServerError
from teacher_wire.generate.messages import SamplingSpec
from teacher_wire.testing.fake_generation import FakeWriter
from teacher_wire.testing.loopback import serve
from tests.e2e.conftest import call_cli
from tests.student_trainer.conftest import fake_for

END = 2  # <|im_end|> of the tiny tokenizer
QUIET = Console(file=io.StringIO())
QUESTIONS = 12


def prompt_of(number):
    return f"Nr. {number}: 苹果 {number} 🍎 and\r\n{number + 1} pears"


def right(number, **changes):
    """The right trace of a question, as plain data."""
    prompt = prompt_of(number).encode()
    quote = f"{number} 🍎 and\r\n"
    start = prompt.index(quote.encode())
    fields = {
        "evidence": [{"id": 0, "start": start, "end": start + len(quote.encode()), "text": quote}],
        "steps": [
            {"id": 1, "kind": "extract", "text": "apples", "evidence": [0], "depends_on": []},
            {"id": 2, "kind": "compute", "text": f"{number}+{number + 1}={2 * number + 1}", "evidence": [],
             "depends_on": [1]},
        ],
        "answer": {"text": str(2 * number + 1)},
    }  # fmt: skip
    return json.dumps(fields | changes, ensure_ascii=False)


def faulty(number, fault):
    fields = json.loads(right(number))
    if fault == "repaired":
        fields["evidence"][0] |= {"start": 0, "end": 3, "text": f"{number} 🍎 and\n{number + 1} pears"}
    if fault == "wrong_answer":
        fields["answer"]["text"] = "999"
    if fault == "invented_evidence":
        fields["evidence"][0]["text"] = "plums"
    if fault == "cyclic_dependency":
        fields["steps"][0]["depends_on"] = [2]
    if fault == "too_long":
        fields["steps"][0]["text"] = "x" * 300
    if fault == "nul":
        fields["steps"][0]["text"] = "\0"
    if fault == "wrong_prompt":
        fields["prompt_sha256"] = "0" * 64
    if fault == "schema":
        del fields["steps"]
    if fault == "wrong_arithmetic":
        fields["steps"][1]["text"] = "1+1=3"
    text = json.dumps(fields, ensure_ascii=False)
    return text[:-2] if fault == "broken_json" else text


FAULTS = ["wrong_answer", "invented_evidence", "cyclic_dependency", "too_long", "nul", "wrong_prompt", "schema",
          "wrong_arithmetic", "broken_json"]  # fmt: skip


@pytest.fixture
def world(tmp_path, model_factory):
    """A fake teacher that writes `texts[number, sample]`, else the right trace; and a config for it."""
    folder = model_factory("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fake = fake_for(folder)
    texts = {}

    def write(prompt_ids, sample):
        number = int(re.search(r"Nr. (\d+)", tokenizer.decode(prompt_ids)).group(1))
        text = texts.get((number, sample), texts.get(number)) or right(number)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], END]

    fake.writer = FakeWriter(write=write)
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(
        json.dumps({"prompt": prompt_of(n), "answer": f" {2 * n + 1}.0 "}, ensure_ascii=False) + "\n"
        for n in range(QUESTIONS)
    ))  # fmt: skip
    with serve(fake) as server:
        fake.texts, fake.rows, fake.server, fake.folder = texts, rows, server, tmp_path / "out"

        def config(**sections):
            tree = {
                "output_dir": str(fake.folder), "tokenizer": str(folder), "data": {"sources": [str(rows)]},
                "teacher": {"address": server.address, "retry_s": 5}, "prompts_per_call": 3,
                "sampling": {"samples": 1}, "caps": {"step_bytes": 256},
            }  # fmt: skip
            for name, section in sections.items():
                tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
            return parse_as(TracesConfig, tree, "test")

        fake.config = config
        yield fake


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(world, resume=False, **sections):
    return make_traces(world.config(**sections), resume=resume, console=QUIET)


def test_right_traces_are_kept_in_order_and_complete(world):
    stats = run(world).stats
    assert (stats.questions, stats.with_trace, stats.samples, stats.accepted) == (12, 12, 12, 12)
    rows = lines(world.folder / "traces.jsonl")
    assert [row["source"] for row in rows] == [f"{world.rows}:{n + 1}" for n in range(QUESTIONS)]
    for number, row in enumerate(rows):
        trace = parse(json.dumps(row["trace"]))
        assert row["conversation"] == [{"role": "user", "content": prompt_of(number)}]
        assert trace.answer.normalized == str(2 * number + 1)
        for quote in trace.evidence:
            assert prompt_of(number).encode()[quote.start : quote.end].decode() == quote.text
        assert trace.teacher_revision == world.teacher_info().fingerprint
        assert 0.2 <= trace.steps[0].confidence < 1 and trace.answer.confidence < 1, "probabilities of the tokens"
    figures = json.loads((world.folder / "stats.json").read_text())
    assert figures["accept_rate"] == 1 and figures["tokens_per_s"] > 0


def test_planted_faults_are_quarantined_by_reason_and_fall_back_to_the_answer(world):
    for number, fault in enumerate(FAULTS):
        world.texts[number] = faulty(number, fault)
    world.texts[10] = faulty(10, "repaired")
    stats = run(world).stats
    assert stats.rejected == dict.fromkeys(sorted(FAULTS, key=list(stats.rejected).index), 1)
    assert (stats.accepted, stats.repaired) == (3, 1)
    assert [entry["reason"] for entry in lines(world.folder / "quarantine.jsonl")] == FAULTS
    rows = lines(world.folder / "traces.jsonl")
    assert [row["trace"] is None for row in rows] == [True] * len(FAULTS) + [False] * 3
    assert rows[0]["answer"] == " 1.0 "
    (quote,) = rows[10]["trace"]["evidence"]
    assert prompt_of(10).encode()[quote["start"] : quote["end"]].decode() == quote["text"] == "10 🍎 and\r\n11 pears"


def test_without_answers_the_majority_decides_and_is_the_confidence(world):
    world.texts[3, 1] = faulty(3, "wrong_answer")
    for sample in (0, 2, 4):
        world.texts[4, sample] = faulty(4, "wrong_answer")
    world.texts[5, 0], world.texts[5, 1] = faulty(5, "wrong_answer"), right(5).replace('"11"', '"12"')
    world.texts[5, 2] = world.texts[5, 3] = world.texts[5, 4] = "no JSON"
    stats = run(world, data={"use_answers": False}, sampling={"samples": 5}).stats
    assert stats.rejected == {"broken_json": 3, "minority_answer": 1 + 2 + 2}
    rows = {row["source"].rpartition(":")[2]: row for row in lines(world.folder / "traces.jsonl")}
    assert "6" not in rows, "no majority, no known answer: nothing to learn"
    assert rows["4"]["trace"]["answer"]["confidence"] == 0.8 and rows["4"]["trace"]["sampling"]["agree"] == 4
    assert rows["5"]["trace"]["answer"]["normalized"] == "999" and rows["5"]["trace"]["sampling"]["agree"] == 3
    assert rows["5"]["answer"] is None


def test_a_run_that_breaks_is_resumed_without_a_trace_twice(world, tmp_path):
    for number in (1, 7):
        world.texts[number] = faulty(number, "schema")
    run(world)
    straight = {name: (world.folder / name).read_bytes() for name in ("traces.jsonl", "quarantine.jsonl")}
    whole = (world.folder / "progress.jsonl").read_bytes().splitlines(keepends=True)
    for done in (0, 1, 5, 11):
        broken = tmp_path / f"broken{done}"
        shutil.copytree(world.folder, broken)
        (broken / "progress.jsonl").write_bytes(b"".join(whole[:done]) + whole[done][:20])
        with (broken / "traces.jsonl").open("ab") as file:
            file.write(b'{"half a')
        before = world.writer.written
        result = run(world, resume=True, output_dir=str(broken))
        assert world.writer.written - before == QUESTIONS - done
        for name, content in straight.items():
            assert (broken / name).read_bytes() == content
        assert result.stats.questions == QUESTIONS
    assert run(world, resume=True).stats.questions == QUESTIONS, "a finished run has nothing left to do"


def test_a_crashing_teacher_leaves_what_is_done(world):
    world.writer.mistake = "crash"
    with pytest.raises(ServerError):
        run(world)
    world.writer.mistake = ""
    world.writer.break_after = 2
    assert run(world, resume=True).stats.questions == QUESTIONS


def test_another_run_is_not_taken_up(world):
    run(world)
    with pytest.raises(ConfigError, match="holds a run already"):
        run(world)
    with pytest.raises(RunError, match="sampling"):
        run(world, resume=True, sampling={"samples": 2})
    world.rows.write_text(world.rows.read_text().replace("pears", "plums"))
    with pytest.raises(RunError, match="questions"):
        run(world, resume=True)
    (world.folder / "traces.jsonl").unlink()
    world.rows.write_text(world.rows.read_text().replace("plums", "pears"))
    with pytest.raises(RunError, match=r"traces\.jsonl"):
        run(world, resume=True)


def test_a_teacher_below_the_rate_stops_the_run(world):
    for number in range(QUESTIONS):
        world.texts[number] = "no JSON"
    with pytest.raises(RunError, match=r"0 of 10 samples.*broken_json 10.*quarantine"):
        run(world, accept={"min_rate": 0.2, "after": 10}, prompts_per_call=5)
    assert len(lines(world.folder / "quarantine.jsonl")) == 10
    with pytest.raises(RunError, match="0 of 10"):
        run(world, resume=True, accept={"min_rate": 0.2, "after": 10})


def test_what_cannot_work_is_said_before_anything_is_asked(world, model_factory, tmp_path):
    with pytest.raises(LimitError) as caught:
        run(world, sampling={"max_new_tokens": 4096})
    assert "longest question" in caught.value.__notes__[0]
    world.writer.generates = ("tokens",)
    with pytest.raises(CapabilityError):
        run(world)
    assert run(world, sampling={"json_schema": False}).stats.accepted == QUESTIONS
    world.tokenizer_sha256 = "0" * 64
    with pytest.raises(MismatchError, match="tokenizer"):
        run(world, output_dir=str(tmp_path / "other"))
    for row, field in (
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x", "answer": 3}, "answer"),
        ({"prompt": "x", "y": 1}, "y"),
    ):
        world.rows.write_text(json.dumps(row))
        with pytest.raises(DataError, match=f"field={field}"):
            run(world, output_dir=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_the_command(world, capsys, monkeypatch, tmp_path):
    tree = world.config().model_dump(mode="json")
    file = tmp_path / "traces.yaml"
    file.write_text(yaml.safe_dump(tree))
    code, said = call_cli(capsys, monkeypatch, "traces", file)
    assert code == 0 and "accepted 12 (100.0%)" in said and "traces.jsonl" in said, said
    code, said = call_cli(capsys, monkeypatch, "traces", file)
    assert code == 2 and "holds a run already; go on with --resume" in said
    assert call_cli(capsys, monkeypatch, "traces", file, "--resume", "auto")[0] == 0
    code, said = call_cli(capsys, monkeypatch, "traces", file, "sampling.sample=3")
    assert code == 2 and "sampling.sample: unknown key" in said


def short(number):
    """The right trace of a question as style `quotes` has it."""
    steps = [
        {"text": "apples", "quotes": [f"苹果 {number}"]},
        {"text": f"{number}+{number + 1}={2 * number + 1}", "quotes": []},
    ]
    return json.dumps({"steps": steps, "answer": str(2 * number + 1)}, ensure_ascii=False, separators=(",", ":"))


def free(number):
    return f'Nr. {number} has "苹果 {number}".\n{number}+{number + 1}={2 * number + 1}\nAnswer: {2 * number + 1}'


def rows_for(world, style, write):
    world.texts |= {number: write(number) for number in range(QUESTIONS)}
    stats = run(world, style=style, output_dir=str(world.folder / style)).stats
    assert (stats.accepted, stats.repaired, stats.with_trace) == (QUESTIONS, 0, QUESTIONS), stats.describe()
    return lines(world.folder / style / "traces.jsonl")


def test_every_style_leaves_rows_that_train_alike(world):
    world.folder.mkdir()
    for style, write in (("quotes", short), ("free", free), ("offsets", right)):
        for number, row in enumerate(rows_for(world, style, write)):
            trace = parse(json.dumps(row["trace"]))
            assert trace.answer.normalized == str(2 * number + 1) and trace.steps[1].kind == "compute"
            assert 0.2 <= trace.steps[0].confidence < 1 and trace.answer.confidence < 1, "probabilities of the tokens"
            (quote,) = trace.evidence
            assert prompt_of(number).encode()[quote.start : quote.end].decode() == quote.text
        rows = parse_rows_of(world.folder / style / "traces.jsonl")
        assert [row.task for row in rows] == ["reason", "answer"] * QUESTIONS
        assert ("[ev: " in rows[0].conversation.turns[-1].content) and rows[0].conversation.turns[-1].content.endswith(
            "\n1.0"
        )


def parse_rows_of(path):
    """The rows as a training run reads them."""
    found = read_source(source_of(SourceConfig(path=str(path))))
    return task_rows(found, "trace", "", TraceTasks(), Intake("fail"))


def test_samples_of_free_text_are_counted_by_reason(world):
    world.texts |= {number: free(number) for number in range(QUESTIONS)}
    world.texts |= {
        0: "I do not know.",
        1: "<think>1+2",
        2: free(2).replace("Answer: 5", "Answer: 6"),
        3: free(3) + "\nAnswer: 9",
    }
    stats = run(world, style="free").stats
    assert stats.rejected == {"broken_form": 1, "no_answer": 2, "wrong_answer": 1} and stats.accepted == QUESTIONS - 4


def test_the_teacher_reads_instruction_and_examples_and_the_student_does_not(world):
    world.texts |= {number: free(number) for number in range(QUESTIONS)}
    tokenizer = AutoTokenizer.from_pretrained(world.config().tokenizer)
    config = world.config(
        style="free", data={"examples": [{"prompt": "One?", "reply": "Two."}], "instruction": "Be short."}
    )
    asked = [tokenizer.decode(ids) for ids in encode_questions(read_questions(config.data), tokenizer, config)]
    assert all(text.index("Be short.") < text.index("One?") < text.index("Two.") < text.index("Nr.") for text in asked)
    make_traces(config, console=QUIET)
    assert "Two." not in (world.folder / "traces.jsonl").read_text()


def test_a_run_that_accepts_nothing_ends_with_an_error_and_advice(world, capsys, monkeypatch, tmp_path):
    world.texts |= {number: faulty(number, "invented_evidence") for number in range(QUESTIONS)}
    file = tmp_path / "traces.yaml"
    file.write_text(yaml.safe_dump(world.config().model_dump(mode="json")))
    code, said = call_cli(capsys, monkeypatch, "traces", file)
    assert code == 2 and "none of 12 samples was accepted (invented_evidence 12)" in said and "done" not in said
    assert "12 of 12 rejected samples are invented_evidence" in said and "style=steps" in said
    assert len(lines(world.folder / "quarantine.jsonl")) == QUESTIONS, "what was written is there to be read"
    assert call_cli(capsys, monkeypatch, "traces", file, "--resume", "auto")[0] == 2, (
        "a finished run has not got better"
    )


def test_a_run_that_accepts_little_says_so_last(world, capsys, monkeypatch, tmp_path):
    world.texts |= {number: faulty(number, "wrong_answer") for number in range(2, QUESTIONS)}
    world.texts |= {0: "no JSON"}
    file = tmp_path / "traces.yaml"
    file.write_text(yaml.safe_dump(world.config().model_dump(mode="json")))
    code, said = call_cli(capsys, monkeypatch, "traces", file)
    assert code == 0 and "ended with little: only 1 of 12 samples were accepted (8.3%; accept.min_rate is 20%)" in said
    assert "10 of 11 rejected samples are wrong_answer: " in said and "\ndone" not in said


def test_advice_speaks_of_one_reason_that_stands_out(world):
    def said(accepted, style="quotes", sampling=None, **rejected):
        stats = Stats(samples=accepted + sum(rejected.values()), accepted=accepted, rejected=rejected)
        return advice(stats, world.config(style=style, sampling=sampling or {}))

    assert said(100) == said(90, wrong_answer=10) == "" and said(0) == ""
    assert said(10, schema=5, wrong_answer=5, nul=5) == "", "none stands out"
    assert "raise sampling.max_new_tokens (now 1,024)" in said(0, unfinished=5)
    assert "sampling.fit_budget=true" in said(0, unfinished=5, sampling={"fit_budget": False})
    assert "style=steps or quotes" in said(0, style="free", no_answer=5) and "builtin_examples" in said(
        0, style="free", no_answer=5
    )
    assert "builtin_examples" not in said(0, invented_evidence=5), "they are shown already"
    for reason in REASONS:
        for style in ("quotes", "free"):
            assert said(0, style=style, **{reason: 5}).startswith(f"5 of 5 rejected samples are {reason}: ")


def test_bounds_are_told_and_known_answers_that_do_not_fit(world):
    world.rows.write_text(json.dumps({"prompt": prompt_of(0), "answer": "1 " * 300}))
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(RunError, match=r"none of 1 samples was accepted"):
        make_traces(world.config(sampling={"max_new_tokens": 300}), console=console)
    said = console.file.getvalue()
    assert "the grammar admits at most " in said and "of sampling.max_new_tokens=300" in said
    assert "1 known answers are longer than " in said
    with pytest.raises(ConfigError, match=r"max_new_tokens=20 is too few"):
        run(world, sampling={"max_new_tokens": 20})


def test_another_style_is_another_run(world):
    run(world)
    with pytest.raises(RunError, match=r"style: quotes -> offsets"):
        run(world, resume=True, style="offsets")


def test_training_rows_are_questions_too(world):
    rows = [{"instruction": f"Nr. {n}:", "input": prompt_of(n).partition(": ")[2], "output": "?"} for n in range(2)]
    world.rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    world.texts |= {n: right(n).replace('"start": ', '"start": 1') for n in range(2)}
    stats = run(world, data={"use_answers": False}).stats
    assert (stats.with_trace, stats.repaired) == (2, 2)


def test_calls_stay_within_the_teachers_limits(world):
    info = world.teacher_info()
    prompts = [[1] * n for n in (5, 900, 3, 3, 3, 3, 800)]
    spec = SamplingSpec(samples=64, max_new_tokens=4000)
    groups = list(_groups(prompts, 1, 3, spec, info))
    assert [list(group) for group in groups] == [[1, 2, 3], [4, 5, 6]]
    spec = SamplingSpec(samples=64, max_new_tokens=8000)
    groups = list(_groups(prompts, 0, 9, spec, info))
    assert [number for group in groups for number in group] == list(range(7))
    for group in groups:
        assert sum(64 * (len(prompts[n]) + 8000) for n in group) <= info.limits.max_generate_tokens


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from([None, 1, "\t"]), st.booleans())
@settings(deadline=None)
def test_places_of_values(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    spans = value_spans(text)

    def check(node, path):
        if isinstance(node, dict | list):
            for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
                check(inner, (*path, key))
        else:
            start, end = spans.pop(path)
            assert json.loads(text[start:end]) == node

    check(value, ())
    assert not spans


@pytest.mark.parametrize("text", ["plain cat sat", "苹果 🍎 é", '{"a": "🍎\\n"}', ""])
def test_places_of_tokens(model_factory, text):
    tokenizer = AutoTokenizer.from_pretrained(model_factory("qwen2"))
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
    spans = token_spans(ids, text, tokenizer)
    assert len(spans) == len(ids) and spans[-1] == (len(text), len(text))
    for (start, end), token_id in zip(spans, ids, strict=True):
        piece = tokenizer.decode([token_id], skip_special_tokens=True)
        assert text[start:end] == piece or "\ufffd" in piece
    logp = np.full(len(ids), -1.0, np.float32)
    assert mean_probability(spans, logp, (0, max(1, len(text)))) == pytest.approx(math.exp(-1) if text else 1.0)
