"""`student-trainer label --generate` against a fake that writes: rows that training reads, refusals by name, one answer each after a kill."""

import hashlib
import io
import json
import shutil

import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from student_trainer.config.run import parse_config
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import DataSource
from student_trainer.errors import ConfigError, DataError, RunError
from student_trainer.traces.seq_kd.run import generate_rows
from student_trainer.training.run import train
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError, ServerError
from teacher_wire.testing.fake_generation import FakeWriter
from teacher_wire.testing.loopback import serve
from tests.e2e.conftest import call_cli
from tests.student_trainer.conftest import fake_for, run_config

END = 2  # <|im_end|> of the tiny tokenizer
QUIET = Console(file=io.StringIO())
ROWS = 9


@pytest.fixture
def world(tmp_path, model_factory):
    """A fake teacher that answers "old dog NUMBER", or `texts[number]`; rows; and a config."""
    folder = model_factory("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fake = fake_for(folder)
    texts, asked = {}, []

    def write(prompt_ids, sample):
        prompt = tokenizer.decode(prompt_ids)
        asked.append(prompt)
        number = int(prompt.rpartition("Nr. ")[2].partition("<")[0].partition("\n")[0].split()[0])
        said = texts.get((number, sample), texts.get(number, f"the old dog {number}"))
        return said if isinstance(said, list) else [*tokenizer(said, add_special_tokens=False)["input_ids"], END]

    fake.writer = FakeWriter(write=write)
    path = tmp_path / "rows.jsonl"

    def rows(made=None):
        made = made or [{"prompt": f"Nr. {n}", "completion": "a cat", "hint": f"hint {n}"} for n in range(ROWS)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))

    rows()
    with serve(fake) as server:

        def config(**sections):
            context = sections.pop("context", None)
            section = {"output_dir": str(tmp_path / "out"), "max_new_tokens": 24, "prompts_per_call": 2}
            tree = run_config(tmp_path, folder, path, server.address, **sections)
            tree["generate"] = section | (sections.get("generate") or {})
            tree["teacher"] |= {"context": context, "retry_s": 5}
            return parse_config(tree, "test")

        fake.config, fake.texts, fake.asked, fake.rows = config, texts, asked, rows
        fake.out, fake.path, fake.tokenizer, fake.model = tmp_path / "out", path, tokenizer, folder
        fake.address = server.address
        yield fake


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("rows.jsonl", "refused.jsonl")}


def test_each_row_gets_the_teachers_answer_and_the_file_is_rows_to_train_on(world, tmp_path):
    made = generate_rows(world.config(), QUIET)
    rows = lines(world.out / "rows.jsonl")
    assert rows == [
        {"messages": [{"role": "user", "content": f"Nr. {n}"}, {"role": "assistant", "content": f"the old dog {n}"}]}
        for n in range(ROWS)
    ]
    assert (made.stats.asked, made.stats.written, made.stats.retokenized, made.stats.refused) == (ROWS, ROWS, 0, {})
    again = build_dataset([DataSource(str(world.out / "rows.jsonl"))], world.tokenizer, max_tokens=100)
    own = build_dataset([DataSource(str(world.path))], world.tokenizer, max_tokens=100)
    for item, source in zip(again, own, strict=True):  # the prompts are those of inference and of the rows
        cut = int(source.example.loss_mask.argmax())
        assert item.example.token_ids[:cut].tolist() == source.example.token_ids[:cut].tolist()
    asked = {tuple(i.example.token_ids[: int(i.example.loss_mask.argmax())].tolist()) for i in own}
    assert {tuple(world.tokenizer(p, add_special_tokens=False)["input_ids"]) for p in world.asked} == asked
    tree = run_config(tmp_path, world.model, world.out / "rows.jsonl", world.address, train={"max_steps": 2})
    assert train(parse_config(tree, "test"), console=QUIET).steps == 2
    assert json.loads((world.out / "stats.json").read_text())["written"] == ROWS


def test_earlier_answers_are_context_and_what_is_beside_the_messages_stays(world):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Nr. 0"},
        {"role": "assistant", "content": "a cat", "weight": 0.5},
    ]
    world.rows([{"messages": talk, "hint": "h", "colour": "red"}, {"messages": [*talk[:4], talk[4] | {"weight": 0}]}])
    made = generate_rows(world.config(context={"field": "hint"}, data={"bad_rows": "skip"}), QUIET)
    (row,) = lines(world.out / "rows.jsonl")
    assert row["messages"][2] == {"role": "assistant", "content": "Hi.", "weight": 0}
    assert row["messages"][4] == {"role": "assistant", "content": "the old dog 0", "weight": 0.5}
    assert row["hint"] == "h" and "colour" not in row and made.stats.asked == 1
    assert "Nr. 0\n\nh" in world.asked[0], "the teacher is asked with what it alone is told"
    (item,) = build_dataset([DataSource(str(world.out / "rows.jsonl"))], world.tokenizer, max_tokens=200)
    assert world.tokenizer.decode(item.example.token_ids[item.example.loss_mask]) == "the old dog 0<|im_end|>"


def test_the_day_the_system_prompt_and_the_columns_are_the_runs(world):
    world.rows([{"frage": f"Nr. {n}", "antwort": "x"} for n in range(2)])
    columns = {"frage": "prompt", "antwort": "completion"}
    data = {"train": [{"path": str(world.path), "columns": columns}], "eval": [], "system_prompt": "Say it."}
    generate_rows(world.config(data=data), QUIET)
    (first, _) = lines(world.out / "rows.jsonl")
    assert first["messages"][0] == {"role": "system", "content": "Say it."} and "Say it." in world.asked[0]


def test_what_nobody_could_learn_from_is_refused_by_name(world):
    ids = world.tokenizer("a b", add_special_tokens=False)["input_ids"]
    euro = world.tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(euro) == 3
    world.texts |= {
        1: ids * 30,  # runs into max_new_tokens
        2: [END],
        3: [*euro[:2], END],
        4: [*ids, 1, *ids, END],  # <|im_start|>
        5: "the old dog 5 by",
    }
    (fitting, *_) = build_dataset([DataSource(str(world.path))], world.tokenizer, max_tokens=100)
    prompt = int(fitting.example.loss_mask.argmax())
    most = prompt + len(world.tokenizer("the old dog 5<|im_end|>")["input_ids"])
    made = generate_rows(world.config(data={"max_tokens": most}), QUIET)
    refused = lines(world.out / "refused.jsonl")
    assert [(entry["source"].rpartition(":")[2], entry["reason"]) for entry in refused] == [
        ("2", "cut_off"), ("3", "empty"), ("4", "no_text"), ("5", "control_token"), ("6", "too_long"),
    ]  # fmt: skip
    assert f"data.max_tokens={most}" in refused[4]["detail"] and "24 tokens" in refused[0]["detail"]
    assert made.stats.written == 4 and made.stats.refused == dict.fromkeys(
        ("cut_off", "empty", "no_text", "control_token", "too_long"), 1
    )
    assert [row["messages"][0]["content"] for row in lines(world.out / "rows.jsonl")] == [
        "Nr. 0",
        "Nr. 6",
        "Nr. 7",
        "Nr. 8",
    ]


def test_answers_that_are_cut_otherwise_are_counted(world):
    the = world.tokenizer("the", add_special_tokens=False)["input_ids"]
    letters = [world.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "the"]
    assert the != letters
    world.texts[4] = [*letters, END]
    assert generate_rows(world.config(), QUIET).stats.retokenized == 1


def test_several_samples_are_a_row_each(world):
    for n in range(ROWS):
        world.texts |= {(n, 0): "the cat", (n, 1): "the dog"}
    world.texts[3, 1] = [END]
    made = generate_rows(world.config(generate={"samples": 2, "temperature": 1.0}), QUIET)
    rows = lines(world.out / "rows.jsonl")
    assert made.stats.written == len(rows) == 2 * ROWS - 1 and made.stats.refused == {"empty": 1}
    assert [row["messages"][1]["content"] for row in rows[:2]] == ["the cat", "the dog"]
    assert lines(world.out / "refused.jsonl")[0]["sample"] == 1
    with pytest.raises(ConfigError, match=r"samples=2 of temperature 0 would all be the same"):
        world.config(generate={"samples": 2})


def test_after_a_kill_each_row_is_there_once_and_the_files_are_the_same(world, tmp_path):
    world.texts[2] = [END]
    generate_rows(world.config(generate={"output_dir": str(tmp_path / "straight")}), QUIET)
    before = world.writer.written
    world.writer.mistake = "crash"
    with pytest.raises(ServerError):
        generate_rows(world.config(), QUIET)
    world.writer.mistake = ""
    generate_rows(world.config(), QUIET)
    assert digest(world.out) == digest(tmp_path / "straight")
    for torn in range(3):  # a kill amid any line: what is behind the last whole line of progress is cut off
        folder = tmp_path / f"torn{torn}"
        shutil.copytree(world.out, folder)
        progress = (folder / "progress.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "progress.jsonl").write_bytes(b"".join(progress[:4]) + progress[4][: 10 * torn])
        written = world.writer.written
        generate_rows(world.config(generate={"output_dir": str(folder)}), QUIET)
        assert digest(folder) == digest(tmp_path / "straight")
        assert world.writer.written - written == ROWS - 4, "what is there is not asked again"
    written = world.writer.written
    assert generate_rows(world.config(), QUIET).stats.asked == ROWS and world.writer.written == written > before


@pytest.mark.parametrize(
    "change",
    [
        {"generate": {"temperature": 0.5}},
        {"generate": {"max_new_tokens": 20}},
        {"data": {"system_prompt": "Other."}},
        {"data": {"max_tokens": 90}},
        {"context": {"field": "hint"}},
    ],
    ids=["temperature", "max_new_tokens", "system_prompt", "max_tokens", "context"],
)
def test_another_job_in_the_same_folder_is_refused(world, change):
    generate_rows(world.config(), QUIET)
    before = digest(world.out)
    with pytest.raises(RunError, match="was started with something else"):
        generate_rows(world.config(**change), QUIET)
    assert digest(world.out) == before


def test_a_users_own_folder_is_left_alone(world):
    world.out.mkdir()
    (world.out / "rows.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match=r"generate\.output_dir .*: holds rows\.jsonl and no run"):
        generate_rows(world.config(), QUIET)
    assert (world.out / "rows.jsonl").read_text() == '{"mine": 1}\n'


def test_rows_go_by_policy(world):
    rows = [{"prompt": f"Nr. {n}", "completion": "a cat"} for n in range(3)]
    world.rows([rows[0], {"prompt": "Nr. 1"}, rows[2]])
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        generate_rows(world.config(), QUIET)
    shown = io.StringIO()
    made = generate_rows(world.config(data={"bad_rows": "skip"}), Console(file=shown, width=300))
    assert made.stats.asked == 2 and "1 bad rows skipped, the first" in shown.getvalue()
    assert [bad["line"] for bad in lines(world.out / "bad_rows.jsonl")] == [2]


def test_a_prompt_above_the_teachers_limits_is_a_bad_row(world):
    rows = [{"prompt": f"Nr. {n} " + "dog " * (4_090 if n == 1 else 1), "completion": "a cat"} for n in range(3)]
    world.rows(rows)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: its prompt of .* tokens cannot be answered: .*generate\.max_new_tokens"
    ):
        generate_rows(world.config(), QUIET)
    made = generate_rows(world.config(data={"bad_rows": "skip"}), QUIET)
    assert made.stats.asked == 2 and [bad["line"] for bad in lines(world.out / "bad_rows.jsonl")] == [2]
    with pytest.raises(LimitError, match="max_new_tokens"):
        generate_rows(world.config(generate={"max_new_tokens": 5000, "output_dir": str(world.out) + "2"}), QUIET)


def test_a_teacher_that_does_not_fit_is_named_before_there_is_a_folder(world, model_factory, tmp_path):
    world.writer.generates = ()
    with pytest.raises(CapabilityError, match="does not generate this way"):
        generate_rows(world.config(), QUIET)
    world.writer.generates, world.chat_template_sha256 = ("tokens",), "0" * 64
    with pytest.raises(MismatchError, match="another chat template"):
        generate_rows(world.config(), QUIET)
    world.tokenizer_sha256 = "0" * 64
    with pytest.raises(MismatchError, match="another tokenizer"):
        generate_rows(world.config(), QUIET)
    assert not world.out.exists()


def test_a_teacher_of_which_nothing_can_be_learned_ends_the_command(world):
    world.texts |= {n: [END] for n in range(ROWS)}
    with pytest.raises(RunError, match=r"none of its 9 answers can be learned from: .*empty 9; see .*refused\.jsonl"):
        generate_rows(world.config(), QUIET)


def test_the_command(world, tmp_path, capsys, monkeypatch):
    config = tmp_path / "config.yaml"
    tree = world.config().model_dump(mode="json")
    config.write_text(yaml.safe_dump(tree))
    code, said = call_cli(capsys, monkeypatch, "label", "--generate", str(config), "generate.max_new_tokens=23")
    assert code == 0 and f"9 rows are in {world.out / 'rows.jsonl'}" in " ".join(said.split())
    config.write_text(yaml.safe_dump(tree | {"generate": None}))
    code, said = call_cli(capsys, monkeypatch, "label", "--generate", str(config))
    assert code == 2 and "label --generate: set the section generate" in said
