"""Kinds 18, 27, s06, s12: a config said twice, values read as something else than they say, complaints that mislead. Both houses."""

from __future__ import annotations

import ast

import pytest

from student_trainer.config.run import load_config
from student_trainer.errors import ConfigError
from teacher_server.config import server
from teacher_server.errors import ServerConfigError
from tests.cases.material import INPUTS, command

STUDENT = """\
run: {output_dir: runs/x}
model: {path: some/model}
data: {train: [rows.jsonl]}
teacher: {address: "a:1"}
"""
SERVER = "teachers: [{name: a, backend: {kind: fake}}]\n"


@pytest.fixture
def student(tmp_path):
    """(text, overrides) -> TrainConfig."""

    def load(text="", *overrides):
        file = tmp_path / "run.yaml"
        file.write_text(STUDENT + text)
        return load_config(file, list(overrides))

    return load


@pytest.fixture
def house(request, tmp_path):
    """(text, overrides) -> the one line of a refusal, by both houses' readers; "" if there is none."""

    def refusal(which, text, *overrides):
        file = tmp_path / f"{which}.yaml"
        file.write_text((STUDENT if which == "student" else SERVER) + text)
        try:
            (load_config if which == "student" else server.load_config)(file, list(overrides))
        except (ConfigError, ServerConfigError) as error:
            said = str(error)
        else:
            return ""
        assert "\n" not in said and "pydantic" not in said
        return said.removeprefix(f"{file}: ")

    return refusal


# ------------------------------------------------------------------------------------------------ keys said twice


def test_the_case_itself_names_both_lines(tmp_path):
    done = command("train", INPUTS / "twice.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "lines 5 and 6: the key 'train' is there twice" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("which", ["student", "server"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("edge: {port: 1}\nfeed: {max_mb: 3}\nedge:\n  port: 2\n", "the key 'edge' is there twice"),
        ("feed:\n  max_mb: 3\n  max_mb: 3\n", "the key 'max_mb' is there twice"),
        ("feed: {max_mb: 3, 'max_mb': 4}\n", "the key 'max_mb' is there twice"),
        ("feed: &a {x: 1}\nedge: {<<: *a, <<: *a}\n", "the key '<<' is there twice"),
        ("feed: [1, {x: 1, y: 2, x: 3}]\n", "the key 'x' is there twice"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_wherever_it_stands(house, which, text, said):
    assert said in house(which, text) and "line" in house(which, text)


@pytest.mark.parametrize("which", ["student", "server"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("feed: &a {max_mb: *a}\n", "an alias stands inside what it names"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "more than 100,000 values"),
        ("feed: !!python/name:os.system\n", "the tag !!python/name:os.system is not read here"),
        ("feed: {max_mb: !!timestamp soon}\n", "the tag !!timestamp"),
        ("[feed]: 1\n", "a key is a name"),
        ("feed: {max_mb: 3}\n---\nfeed: {max_mb: 4}\n", "another document"),
    ],
)  # fmt: skip
def test_what_yaml_can_do_and_a_config_cannot_mean(house, which, text, said):
    assert said in house(which, text)


def test_merged_sections_give_way_to_what_stands_there(student):
    config = student("feed: &f {max_mb: 3, max_batches: 7}\ncache: {labels: true}\n", "feed.window_mb=9")
    assert (config.feed.max_mb, config.feed.max_batches, config.feed.window_mb) == (3, 7, 9)
    text = "train: &t {learning_rate: 1e-3, batch_size: 4}\nloss: {sft_weight: 0.5}\n"
    merged = student(text, "train={batch_size: 2}")
    assert merged.train.batch_size == 2 and merged.train.learning_rate == 1e-4, "an override replaces a section"


# ------------------------------------------------------------------------------------- values of an override


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use the C # 7 rules", "Use the C # 7 rules"),
        ("#1: be brief", "#1: be brief"),
        ("Answer: yes", "Answer: yes"),
        ("a\tb", "a\tb"),
        ("line\n# two", "line\n# two"),
        ("- a list, said in prose", "- a list, said in prose"),
        ("*bold* & more", "*bold* & more"),
        ("@you, 100% | > !", "@you, 100% | > !"),
        ("'quoted # text'", "quoted # text"),
        ('"two\\nlines"', "two\nlines"),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", "true"), ("False", "False"),
        ("1.50", "1.50"), ("007", "007"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("12:30:45", "12:30:45"), ("1e3", "1e3"), (".inf", ".inf"),
        ("null", None), ("~", None), ("'null'", "null"),
    ],
)  # fmt: skip
def test_the_text_of_an_override_is_kept_whole(student, text, expected):
    assert student("", f"data.system_prompt={text}").data.system_prompt == expected


@pytest.mark.parametrize(
    "text", ['"quoted" # and a comment', "[a, b] # c", "[INST] be brief", "'tis", '{a: 1} "', "[a #b, c]"]
)
def test_what_begins_as_yaml_must_end_as_yaml(student, text):
    with pytest.raises(ConfigError, match=r"override data\.system_prompt: .*quotes"):
        student("", f"data.system_prompt={text}")


@pytest.mark.parametrize("which", ["student", "server"])
def test_a_file_keeps_text_where_text_is_expected(tmp_path, student, which):
    if which == "student":
        config = student(
            "train: {report_to: [on, 7, 1.50]}\n", "teacher.name=no", "teacher.tenant=", "run.output_dir=2024"
        )
        assert config.train.report_to == ("on", "7", "1.50")
        assert (config.teacher.name, config.teacher.tenant, config.run.output_dir.name) == ("no", "", "2024")
        return
    file = tmp_path / "server.yaml"
    file.write_text(
        "teachers: [{name: 007, backend: {kind: transformers, model: 2024-01-01, revision: 1e9}}]\ntenants: {010: {weight: 2}, yes: {}}\n"
    )
    config = server.load_config(file, ["edge.host=::1"])
    assert config.teachers[0].name == "007" and set(config.tenants) == {"010", "yes"} and config.edge.host == "::1"
    assert (config.teachers[0].backend.model, config.teachers[0].backend.revision) == ("2024-01-01", "1e9")


def test_numbers_are_read_as_people_write_them(student):
    config = student("train: {learning_rate: 5e-5, batch_size: 010, max_steps: 1_000}\n", "train.weight_decay=1e-2")
    assert (config.train.learning_rate, config.train.batch_size, config.train.max_steps, config.train.weight_decay) == (
        5e-5,
        10,
        1000,
        0.01,
    )
    assert student("train: {bf16: yes, deterministic: off}\n").train.bf16 is True


@pytest.mark.parametrize(
    "key", ["cache.max_gb", "train.learning_rate", "loss.sft_weight", "train.max_steps", "feed.max_mb"]
)
@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "1e400", "9" * 5000])
def test_numbers_that_are_none(house, key, value):
    assert house("student", "", f"{key}={value}").startswith(f"{key}: ")


def test_no_limit_is_a_number_where_it_means_something(student, tmp_path):
    assert student("", "teacher.retry_s=.inf").teacher.retry_s == float("inf")
    file = tmp_path / "server.yaml"
    file.write_text(SERVER + "tenants: {a: {tokens_per_s: .inf}}\n")
    assert server.load_config(file).tenants["a"].tokens_per_s == float("inf")


# ------------------------------------------------------------------------------- complaints that mislead


def test_a_scalar_is_a_list_of_one(student, tmp_path):
    config = student(
        "", "data.train=rows.jsonl", "data.eval={path: held.jsonl}", "train.report_to=wandb", "data.traces.tasks=answer",
        "model.lora.target_modules=q_proj",
    )  # fmt: skip
    assert [source.path for source in (*config.data.train, *config.data.eval)] == ["rows.jsonl", "held.jsonl"]
    assert config.train.report_to == ("wandb",) and config.data.traces.tasks == ("answer",)
    assert config.model.lora.target_modules == "q_proj", "a pattern or a name of peft's, not a list"
    file = tmp_path / "server.yaml"
    file.write_text("teachers: {name: a, backend: {kind: vllm, model: m, roles: generate}}\n")
    (teacher,) = server.load_config(file).teachers
    assert teacher.backend.roles == ("generate",)


def test_a_pair_stays_a_pair(house):
    assert "train.betas" in house("student", "", "train.betas=0.9")


@pytest.mark.parametrize(
    ("which", "text", "said"),
    [
        ("server", "edge: {prot: 1}\n", "edge.prot: unknown key; did you mean port?"),
        ("server", "tenants: {a: {wieght: 1}}\n", "tenants.a.wieght: unknown key; did you mean weight?"),
        ("server", "tokens_file: x\n", "tokens_file: unknown key; did you mean edge.tokens_file?"),
        ("student", "train: {learning_rte: 1}\n", "train.learning_rte: unknown key; did you mean learning_rate?"),
        ("student", "train: {lr: 1}\n", "train.lr: unknown key"),
        ("student", "learning_rate: 1\n", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("student", "labels: {transprot: full}\n", "labels.transprot: unknown key; did you mean transport?"),
    ],
)
def test_a_misspelt_key_gives_one_true_line(house, which, text, said):
    assert house(which, text) == said


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        ("[{nme: a, backend: {kind: fake}}]", "teachers.0.nme: unknown key; did you mean name?"),
        ("[{name: a, backend: {kind: transformers, modle: x}}]", "teachers.0.backend.modle: unknown key; did you mean model?"),
        ("[{name: a, backend: {kin: fake}}]", "teachers.0.backend.kin: unknown key; did you mean kind?"),
        ("[{name: a, backend: {model: x}}]", "teachers.0.backend.kind: missing"),
        ("[{name: a, backnd: {kind: fake}}]", "teachers.0.backnd: unknown key; did you mean backend?"),
    ],
)  # fmt: skip
def test_a_misspelt_server_key_gives_no_second_complaint(tmp_path, teachers, said):
    file = tmp_path / "server.yaml"
    file.write_text(f"teachers: {teachers}\n")
    with pytest.raises(ServerConfigError) as caught:
        server.load_config(file)
    assert str(caught.value) == f"{file}: {said}"


def test_the_two_readers_are_one(pytestconfig):
    """Neither house imports the other; their readers must not drift apart."""
    for name in ("config/yaml_scalars.py", "config/files.py"):
        ours = (pytestconfig.rootpath / "student_trainer" / name).read_text()
        theirs = (pytestconfig.rootpath / "teacher_server" / name).read_text()
        theirs = theirs.replace("teacher_server", "student_trainer").replace("ServerConfigError", "ConfigError")
        assert ast.dump(ast.parse(ours)) == ast.dump(ast.parse(theirs))
