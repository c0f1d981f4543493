"""A file's tensors as its memory: what they are, what writing to them does, and which file they belong to."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from student_trainer.rollout.engines.mapped_weights import MappedWeights


@pytest.fixture
def written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape, dtype in [
            ("wide", (3, 5), torch.float32),
            ("narrow", (7, 2), torch.bfloat16),
            ("half", (4,), torch.float16),
            ("one", (), torch.float32),
            ("none", (0, 4), torch.bfloat16),
        ]
    }
    save_file(tensors | {"steps": torch.tensor([3])}, tmp_path / "w.safetensors", metadata={"format": "pt"})
    return tensors, tmp_path / "w.safetensors"


@pytest.mark.parametrize("registered", [False, True])
def test_they_are_those_of_the_file(written, registered):
    tensors, file = written
    mapped = MappedWeights(file, registered=registered)
    assert mapped.is_registered == (registered and torch.cuda.is_available())
    assert set(mapped.tensors) == set(tensors)  # whole numbers are no weights
    for name, tensor in tensors.items():
        assert mapped.tensors[name].dtype == tensor.dtype and torch.equal(mapped.tensors[name], tensor)


def test_what_is_written_to_one_is_in_the_file_and_in_nothing_else(written):
    tensors, file = written
    mapped, other = MappedWeights(file, registered=False), MappedWeights(file, registered=False)
    mapped.tensors["narrow"].fill_(2)
    assert torch.equal(other.tensors["narrow"], torch.full((7, 2), 2.0, dtype=torch.bfloat16))
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items() if name != "narrow")
    assert torch.equal(found["narrow"], other.tensors["narrow"]) and int(found["steps"]) == 3


def test_a_tensor_that_cannot_be_a_view_is_left_out(tmp_path):
    """A float32 behind an odd number of bytes: safetensors writes none, others do."""
    said = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    said += b" " * (-len(said) % 8)
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(said).to_bytes(8, "little") + said + bytes(5))
    assert not MappedWeights(file, registered=False).tensors


def test_a_file_that_took_its_place_is_another(written, tmp_path):
    _, file = written
    mapped = MappedWeights(file, registered=False)
    assert mapped.is_of(file)
    file.touch()
    assert mapped.is_of(file)
    save_file({"wide": torch.zeros(3, 5)}, tmp_path / "fresh")
    os.replace(tmp_path / "fresh", file)
    assert not mapped.is_of(file)
    assert mapped.tensors["wide"].abs().sum() > 0  # the old one's memory is still there
