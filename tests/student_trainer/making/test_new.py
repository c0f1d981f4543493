"""A student with fewer layers computes what the teacher computes without the others; what cannot be is refused before a byte is written."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.config.run import load_config
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import parse_source
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.making import depth, new, width
from student_trainer.making.new import NewStudent, make_student
from student_trainer.making.outline import layer_names, outline_of, read_config
from student_trainer.making.shards import read_shard
from teacher_server.config.server import load_config as load_server_config
from tests.thorough import first, thorough
from tests.tiny import make_model

IDS = torch.arange(3, 40)[None]
QUIET = Console(quiet=True)
# Of each family its layers, and those that even spacing keeps; bert's are not `model.layers`, qwen3_moe's files are not its module's names.
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},
    "internlm3": {},
    "glm": {},
    "glm4": {},
    "gemma2": {},
    "gemma3_text": {},
    "cohere": {},
    "cohere2": {},
    "granite": {},
    "granitemoe": {},
    "qwen3_moe": {"mlp_only_layers": [1, 3]},
    "hyperclovax": {},
    "nanochat": {},
    "recurrent_gemma": {},
    "falcon_h1": {},
    "phi": {},
    "llama4_text": {"moe_layers": [1, 2, 5]},
    "bert": {},
}


def without(folder, kept):
    """The oracle: the teacher in memory, the other layers taken out of its list and of what its forward reads of them."""
    config = read_config(folder, "teacher")
    names = layer_names(outline_of(config, "teacher"), "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    place, _, last = names.prefixes[0].removesuffix(".").rpartition(".")
    parent = model.get_submodule(place)
    setattr(parent, last, nn.ModuleList([getattr(parent, last)[i] for i in kept]))
    for part in (model.config, parent.config):
        part.num_hidden_layers = len(kept)
        if len(part.to_dict().get("layer_types") or ()) > len(kept):
            part.layer_types = [part.layer_types[i] for i in kept]
    return model


# Plain decoders, of which qwen2 and llama stand for all.
ALIKE = {"qwen3", "internlm3", "glm", "gemma2", "cohere", "cohere2", "granite", "hyperclovax", "nanochat", "phi"}


@pytest.mark.parametrize("family", first(FAMILIES, lambda family: family not in ALIKE))
@torch.no_grad()
def test_the_student_is_the_teacher_without_layers(tmp_path, family):
    teacher = make_model(tmp_path / "teacher", family, **{"num_hidden_layers": 6, **FAMILIES[family]})
    made = make_student(NewStudent(tmp_path / "student", str(teacher), layers=4), QUIET)
    assert made.kept == (0, 2, 3, 5)
    student, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = without(teacher, made.kept)(input_ids=IDS, use_cache=False).logits
    found = student.eval()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    other = without(teacher, (0, 1, 3, 5))(input_ids=IDS, use_cache=False).logits
    assert not torch.allclose(found, other, atol=1e-4), "the oracle would not see another layer"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "student" / file).read_bytes() == (teacher / file).read_bytes()


def test_shards_are_copied_one_by_one(tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    (teacher / "model.safetensors").unlink()
    model.save_pretrained(teacher, max_shard_size="60KB")
    shards = sorted(teacher.glob("model-*.safetensors"))
    assert len(shards) > 3
    make_student(NewStudent(tmp_path / "student", str(teacher), layers=2), QUIET)
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    tensors = {
        name: file
        for file in set(index["weight_map"].values())
        for name in read_shard(tmp_path / "student" / file).tensors
    }
    assert tensors == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        p.nbytes for p in AutoModelForCausalLM.from_pretrained(tmp_path / "student").parameters()
    )
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "student")(input_ids=IDS).logits
        torch.testing.assert_close(
            found, without(teacher, (0, 5))(input_ids=IDS, use_cache=False).logits, atol=0, rtol=0
        )
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut short"):
        make_student(NewStudent(tmp_path / "again", str(teacher), layers=2), QUIET)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of {len(shards)} files of weights, {shards[1].name}"):
        make_student(NewStudent(tmp_path / "again", str(teacher), layers=2), QUIET)
    assert not list(tmp_path.glob("*again*"))


def test_influence_is_one_minus_the_cosine_and_keeps_what_changes_most(tmp_path, rows_file):
    teacher = make_model(tmp_path / "teacher", "qwen2", num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with torch.no_grad():  # layer 2 does next to nothing, layer 4 little
        for number, factor in ((2, 1e-4), (4, 1e-2)):
            for part in (model.model.layers[number].self_attn.o_proj, model.model.layers[number].mlp.down_proj):
                part.weight.mul_(factor)
    model.save_pretrained(teacher)
    made = make_student(
        NewStudent(tmp_path / "s", str(teacher), layers=4, by="influence", sample=f"{rows_file}#5"), QUIET
    )
    assert made.kept == (0, 1, 3, 5)
    rows = build_dataset([parse_source(f"{rows_file}#5")], AutoTokenizer.from_pretrained(teacher), max_tokens=128)
    sums, count = [0.0] * 6, 0
    for row in rows:
        with (
            torch.no_grad()
        ):  # transformers' own list: the last entry is behind the final norm, so layer 5 is not among them
            states = model(
                input_ids=torch.from_numpy(row.example.token_ids.astype("int64"))[None], output_hidden_states=True
            ).hidden_states
        for i in range(5):
            a, b = states[i][0].double(), states[i + 1][0].double()
            sums[i] += float((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum())
        count += row.example.token_ids.size
    assert made.influence[:5] == pytest.approx([total / count for total in sums[:5]], abs=1e-9)
    record = json.loads((tmp_path / "s" / "made_from.json").read_text())
    assert (
        record["kept_layers"] == [0, 1, 3, 5]
        and record["influence"] == list(made.influence)
        and record["by"] == "influence"
    )


def test_even_layers_are_even_with_both_ends():
    assert depth.even_layers(14, 28) == tuple(math.floor(j * 27 / 13 + 0.5) for j in range(14))
    for of in range(2, 40):
        for layers in range(2, of):
            kept = depth.even_layers(layers, of)
            gaps = [b - a for a, b in itertools.pairwise(kept)]
            assert kept[0] == 0 and kept[-1] == of - 1 and len(kept) == layers and max(gaps) - min(gaps) <= 1
    assert depth.even_layers(1, 9) == (0,)
    assert depth.most_influential([0.5, 0.1, 0.5, 0.4], 3) == (0, 2, 3) and depth.most_influential(
        [1.0, 1.0, 1.0], 2
    ) == (0, 1)


def test_what_counts_layers_in_a_config_counts_the_kept_ones():
    config = {
        "num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2, "mlp_only_layers": [0, 4], "decoder_sparse_step": 2, "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1, "block_types": ["r", "r", "a"], "hybrid_override_pattern": "M*M*M-M-", "ssm_multipliers": [1.0] * 8,
        "_name_or_path": "x", "rope_theta": 1e6,
    }  # fmt: skip
    made = depth.student_config(config, (0, 3, 5, 7), "num_hidden_layers", None)
    assert made == {
        "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "decoder_sparse_step": 1, "mlp_only_layers": [0], "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0, "block_types": ["r", "r", "a", "r"], "hybrid_override_pattern": "M*--", "ssm_multipliers": [1.0] * 8,
        "rope_theta": 1e6,
    }  # fmt: skip


def test_a_layer_that_would_compute_otherwise_is_refused(tmp_path):
    """SmolLM3 and others say by an interval which layers turn their keys; a config without the list would turn others."""
    teacher = make_model(tmp_path / "teacher", "qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1, 3])
    honest, new.depth.student_config = new.depth.student_config, lambda *args: {**honest(*args), "mlp_only_layers": []}
    try:
        with pytest.raises(
            ModelError, match=r"layer 3 cannot be layer 2 of 4: .*mlp.* derives it from the layer's number"
        ):
            make_student(NewStudent(tmp_path / "s", str(teacher), layers=4), QUIET)
    finally:
        new.depth.student_config = honest
    assert not list(tmp_path.glob("*s"))


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"layers": 7}, ConfigError, "--layers 7: the teacher has 6; at most 5"),
        ({"layers": 6}, ConfigError, "the teacher itself"),
        ({"layers": 0}, ConfigError, "at least 1 layer"),
        ({}, ConfigError, "set --layers N, --width NAME"),
        ({"layers": 3, "by": "influence"}, ConfigError, "add --sample"),
        ({"layers": 3, "sample": "rows.jsonl"}, ConfigError, "add --by influence"),
        ({"layers": 3, "dtype": "bfloat16"}, ConfigError, "copied as they are"),
        (
            {"size": "9b"},
            ConfigError,
            r"--width 9b: is no size of its family in the table \(qwen2, 6 layers of width 32\); smaller ones: none",
        ),
        ({"size": "0.5B"}, ConfigError, "is not smaller than the teacher"),
        ({"layers": 3, "teacher": "/nowhere/at/all"}, ModelError, "no such folder"),
        ({"layers": 3, "teacher": "nobody/nothing"}, ModelError, "cannot be fetched"),
    ],
)
def test_what_is_refused(model_factory, tmp_path, asked, error, words):
    teacher = model_factory("qwen2", num_hidden_layers=6)
    with pytest.raises(error, match=words):
        make_student(NewStudent(**{"out": tmp_path / "s", "teacher": str(teacher), **asked}), QUIET)
    assert not list(tmp_path.iterdir())


def test_teachers_that_are_none(model_factory, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").touch()
    with pytest.raises(RunError, match="exists already and is not empty"):
        make_student(NewStudent(tmp_path / "s", str(model_factory("qwen2")), layers=1), QUIET)
    broken = make_model(tmp_path / "t", "qwen2")
    config = json.loads((broken / "config.json").read_text())
    for change, words in (
        ({"model_type": "nobodys"}, "family is not known"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method=awq"),
        ({"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"]}, "minimax|layers"),
    ):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=words):
            make_student(NewStudent(tmp_path / "x", str(broken), layers=1), QUIET)
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors"):
        make_student(NewStudent(tmp_path / "x", str(broken), layers=1), QUIET)
    assert not (tmp_path / "x").exists()


def test_a_size_of_the_table_starts_at_random(model_factory, tmp_path, monkeypatch):
    tiny = {"qwen2": {"tiny": width.Size(16, 24, 3, 2, 1, True), "large": width.Size(64, 24, 3, 2, 1, True)}}
    monkeypatch.setattr(width, "SIZES", tiny)
    teacher = model_factory("qwen2", num_hidden_layers=6)
    made = make_student(NewStudent(tmp_path / "a", str(teacher), size="tiny", layers=2, seed=1), QUIET)
    make_student(NewStudent(tmp_path / "b", str(teacher), size="TINY", layers=2, seed=1), QUIET)
    make_student(NewStudent(tmp_path / "c", str(teacher), size="tiny", layers=2, seed=2), QUIET)
    assert "random" in made.notes[0] and made.kept == ()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    student, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings) == (
        16,
        2,
        300,
        True,
    )
    assert len(config.layer_types) == 2
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name) if place == 0 else thorough(family, name)
        for family, table in width.SIZES.items()
        for place, name in enumerate(table)
    ],
)
def test_every_size_of_the_table_makes_a_model(family, name):
    """Weights by the shapes, without memory: near what the size is called (Gemma 2 of "2b" has 2.6)."""
    vocab = {"qwen2": 151_936, "qwen3": 151_936, "gemma2": 256_000, "gemma3_text": 262_144}.get(
        family, 49_152 if "smol" in name else 128_256
    )
    base = {"model_type": family, "vocab_size": vocab, "hidden_size": 10**5, "num_hidden_layers": 100}
    config = width.sized_config(base, width.size_of(base, name), None)
    model = outline_of(new._parsed(config, "x"), "x")
    told = name.rpartition("-")[2]
    expected = float(told[:-1]) * (1e9 if told[-1] == "b" else 1e6)
    total = sum(p.numel() for p in model.parameters())
    assert total == pytest.approx(expected, rel=0.32), f"{total / 1e9:.3f}e9"


def test_the_starter_configs_are_accepted_as_they_are(model_factory, tmp_path, rows_file):
    teacher = model_factory("qwen2", num_hidden_layers=6)
    out = tmp_path / "my student: #1"
    make_student(NewStudent(out, str(teacher), layers=3, rows=str(rows_file)), QUIET)
    config = load_config(out / "student.yaml")
    assert (
        config.model.path == str(out) and config.data.train[0].path == str(rows_file) and config.data.max_tokens == 128
    )
    server = load_server_config(out / "teacher.yaml")
    assert server.teachers[0].backend.model == str(teacher)
    assert config.teacher.address == f"{server.edge.host}:{server.edge.port}"
    assert (
        load_config(
            out / "student.yaml", ["teacher.address=null", f"teacher.embedded={out / 'teacher.yaml'}"]
        ).teacher.embedded
        == out / "teacher.yaml"
    )


def test_layers_behind_the_last_are_left_out():
    names = SimpleNamespace(prefixes=("model.layers.",), count=3)
    from student_trainer.making.outline import LayerNames

    found = LayerNames(names.prefixes, names.count)
    assert found.beyond(["model.layers.3.eh_proj.weight", "model.layers.2.x", "lm_head.weight"]) == [
        "model.layers.3.eh_proj.weight"
    ]
    rename = found.renamer((0, 2))
    assert rename("model.layers.2.mlp.experts.1.up.weight") == "model.layers.1.mlp.experts.1.up.weight"
    assert (
        rename("model.layers.1.x") is None
        and rename("model.layers.3.eh_proj.weight") is None
        and rename("model.norm.weight") == "model.norm.weight"
    )
