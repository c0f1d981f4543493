"""The basis of a teacher's layers: the components by their definition, the same for a revision, kept on disk, refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from teacher_server.backends import build_backend
from teacher_server.backends.transformers.backend import load
from teacher_server.backends.transformers.capture import sample
from teacher_server.config.backends import FakeBackend, TransformersBackend, VllmBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.config.server import ServerConfig, TeacherConfig
from teacher_server.control.preflight import check_files
from teacher_server.errors import ServerConfigError
from teacher_server.replica.engine import TeacherEngine
from teacher_server.signals.features.calibration import calibrate
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis


@pytest.fixture(scope="module")
def teacher(model_factory):
    config = TransformersBackend(model=str(model_factory("qwen2", hidden=64)), dtype="float32", device="cpu")
    return lambda: load(config, deterministic=False)


def features(tmp_path, **changes):
    return FeaturesConfig(**{"rank": 12, "calibration_tokens": 1024, "folder": tmp_path / "kept"} | changes)


def digest(teacher, section):
    teacher.calibrate(section)
    return teacher.facts.artifacts[-1].sha256


def test_the_components_are_those_of_their_definition():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 40, generator=generator) * torch.logspace(0, -2, 40)[:, None]
    pieces = [{n: (torch.randn(200, 40, generator=generator) @ mixing + n) for n in (0, 3)} for _ in range(4)]
    for piece in pieces:
        piece[3][:, 7] += 50.0  # a massive channel
    found = calibrate(lambda layers: [{n: piece[n] for n in layers} for piece in pieces], (0, 3), 40, 6)
    for number, one in found.layers.items():
        state = torch.cat([piece[number] for piece in pieces]).double()
        massive = np.sort((-state.square().mean(0)).argsort(stable=True)[:5].numpy())
        np.testing.assert_array_equal(one.massive_M.array, massive)
        state[:, massive] = 0
        state = state / (state.square().mean(1, keepdim=True) + 1e-6).sqrt()
        np.testing.assert_allclose(one.mean_D.array, state.mean(0), atol=1e-6)
        _, _, expected = torch.linalg.svd(state - state.mean(0), full_matrices=False)
        basis = torch.from_numpy(one.basis_DR.array).double()
        assert ((expected[:6] @ basis).diagonal().abs() - 1).abs().max() < 2e-3
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
        assert (basis[massive] == 0).all()
    assert 7 in found.layers[3].massive_M.array and found.rank == 6


def test_layers_in_groups_give_the_same_basis(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    states = {n: torch.randn(64, 16, generator=generator) for n in range(4)}
    seen = []

    def passes(layers):
        seen.append(tuple(layers))
        return [{n: states[n] for n in layers}]

    whole = calibrate(passes, range(4), 16, 3).artifact().header.sha256
    assert seen == [(0, 1, 2, 3)] * 2
    monkeypatch.setattr("teacher_server.signals.features.calibration.MOMENT_BYTES", 3 * 8 * 16 * 16)
    assert calibrate(passes, range(4), 16, 3).artifact().header.sha256 == whole
    assert seen[2:] == [(0, 1, 2), (0, 1, 2), (3,), (3,)]


def test_a_revision_has_one_basis_and_another_text_another(teacher, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat and saw an old dog run by. " * 300)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"n": 1, "messages": [{"role": "user", "content": "an old dog " * 40}]}) + "\n" for _ in range(9)
        )
    )
    first = teacher()
    basis = digest(first, features(tmp_path, folder=None))
    assert digest(teacher(), features(tmp_path, folder=None)) == basis
    found = {basis}
    for change in (
        {"calibration": text},
        {"calibration": rows},
        {"rank": 8},
        {"layers": (1, 2)},
        {"calibration_tokens": 600},
    ):
        found.add(digest(teacher(), features(tmp_path, folder=None, **change)))
    assert len(found) == 6
    facts = first.facts
    assert (facts.basis_rank, facts.basis_layers, facts.kv_width) == (12, (0, 1, 2), 32)
    assert [told.kind for told in facts.artifacts] == ["output_head", "layer_basis"]
    assert first.artifact(facts.artifacts[0]).header.kind == "output_head"
    assert first.artifact(facts.artifacts[1]).info == facts.artifacts[1]


def test_a_basis_is_kept_and_read_again_and_made_again_if_damaged(teacher, tmp_path, monkeypatch, caplog):
    module = "teacher_server.backends.transformers.capture.calibration.calibrate"
    made = digest(teacher(), features(tmp_path))
    (file,) = (tmp_path / "kept").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, lambda *_: pytest.fail("it was kept"))
        assert digest(teacher(), features(tmp_path)) == made
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest(teacher(), features(tmp_path)) == made and "damaged" in caplog.text
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_of_two_that_calibrate_at_once_both_serve_what_was_kept_first(teacher, tmp_path, monkeypatch):
    module = "teacher_server.backends.transformers.capture.calibration"
    one, other = teacher(), teacher()
    first = digest(one, features(tmp_path))
    read = [None]
    from teacher_server.backends.transformers.capture import calibration

    whole = calibration._read
    monkeypatch.setattr(f"{module}._read", lambda file: read.pop() if read else whole(file))
    monkeypatch.setattr(
        f"{module}.calibrate",
        lambda *_: LayerBasis({0: LayerBasis.of(one.artifact(one.facts.artifacts[-1])).layers[1]}),
    )
    assert digest(other, features(tmp_path)) == first


def test_a_folder_that_takes_nothing_is_no_failure(teacher, tmp_path, caplog):
    (tmp_path / "kept").write_text("no folder")
    assert digest(teacher(), features(tmp_path)) and "not kept" in caplog.text


@pytest.mark.parametrize(
    ("change", "text", "said"),
    [
        ({"calibration": "absent.txt"}, None, "absent.txt: No such file"),
        ({"calibration": "bad.txt"}, b"\xff\xfe\xfa" * 50, "not UTF-8"),
        ({"calibration": "bad.jsonl"}, b'{"a": "text"}\n{"a": \n', "line 2: not JSON"),
        ({"calibration": "bad.jsonl"}, b"[" * 100_000, "line 1: not JSON"),
        ({"calibration": "short.txt"}, b"the cat", "holds no text of 16 tokens"),
        ({"calibration": "rows.jsonl"}, b'{"a": 1}\n' * 9, "holds no text of 16 tokens"),
        (
            {"calibration": "little.txt"},
            b"the cat sat on a mat " * 3,
            "needs 24: give a longer text or a lower features.rank",
        ),
        ({"layers": (1, 3)}, None, "features.layers.* has no layer 3, only 0..2"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_by_name(teacher, tmp_path, change, text, said):
    if "calibration" in change:
        change = {"calibration": tmp_path / change["calibration"]}
        if text is not None:
            change["calibration"].write_bytes(text)
    with pytest.raises(ServerConfigError, match=said) as caught:
        teacher().calibrate(features(tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_a_model_that_hands_no_states_over_is_refused(teacher, tmp_path):
    from dataclasses import replace

    model = teacher()
    model._facts = replace(model.facts, transports=("top_k",))
    with pytest.raises(ServerConfigError, match="gives no states of its layers"):
        model.calibrate(features(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [3, 1]}, "rise"),
        ({"layers": [1, 1]}, "rise"),
        ({"layers": ["all", 1]}, "numbers"),
        ({"layers": []}, "at least 1"),
        ({"layers": -1}, "greater than or equal to 0"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"calibration_tokens": 3}, "greater than or equal to 64"),
        ({"rankk": 3}, "not permitted"),
    ],
)
def test_a_section_that_means_nothing_is_refused(change, said):
    with pytest.raises(ValidationError, match=said):
        FeaturesConfig(**change)


def test_layers_are_all_or_some():
    assert FeaturesConfig(layers="all").chosen(3) == (0, 1, 2, 3) == FeaturesConfig().chosen(3)
    assert FeaturesConfig(layers=2).chosen(3) == (2,) and FeaturesConfig(layers=[0, 5]).chosen(3) == (0, 5)


def test_vllm_with_features_is_refused_with_the_config():
    with pytest.raises(ValidationError, match="backend vllm gives no states of layers"):
        TeacherConfig(name="t", backend=VllmBackend(model="m"), features=FeaturesConfig())


def test_the_engine_calibrates_what_its_config_says(tmp_path):
    config = TeacherConfig(name="t", backend=FakeBackend(layers=3, hidden_size=24), features=FeaturesConfig(rank=6))
    info = TeacherEngine(config).info
    assert (info.basis_rank, info.basis_layers, info.layers) == (6, (0, 1, 2, 3), 3) and info.artifact("layer_basis")
    plain = TeacherEngine(config.model_copy(update={"features": None})).info
    assert (plain.basis_rank, plain.basis_layers, [told.kind for told in plain.artifacts]) == (0, (), ["output_head"])
    assert plain.fingerprint == info.fingerprint
    with pytest.raises(ServerConfigError, match="the fake has a basis of no text"):
        TeacherEngine(config.model_copy(update={"features": FeaturesConfig(layers=(1, 2))}))

    class Plain:
        facts = build_backend(config.backend, deterministic=False).facts

    with pytest.raises(ServerConfigError, match="gives no states of layers: remove `features`"):
        TeacherEngine(config, Plain())


def test_a_sample_is_as_long_as_asked_and_cut_to_what_the_model_takes(model_factory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_factory("qwen2", hidden=64))
    for tokens, longest in ((1000, 128), (700, 4096)):
        sequences = sample.token_ids(FeaturesConfig(calibration_tokens=tokens), tokenizer, 300, longest)
        lengths = [len(ids) for ids in sequences]
        assert tokens - 16 < sum(lengths) <= tokens and max(lengths) == min(512, longest) and min(lengths) >= 16
        assert all(ids.dtype == np.int32 and ids.max() < 300 for ids in sequences)


def test_a_calibration_file_that_is_not_there_is_found_before_anything_starts(tmp_path):
    teacher = TeacherConfig(name="t", backend=FakeBackend(), features=FeaturesConfig(calibration=tmp_path / "absent"))
    with pytest.raises(ServerConfigError, match=r"teachers.t.features.calibration: .*absent: No such file"):
        check_files(ServerConfig(teachers=(teacher,)))
