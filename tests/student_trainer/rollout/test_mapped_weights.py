"""A file's tensors as its memory: what they are, what writing to them does, and which file they belong to."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from student_trainer.rollout.engines import mapped_weights, vllm_worker
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


def test_they_are_those_of_the_file(written):
    tensors, file = written
    mapped = MappedWeights(file)
    assert set(mapped.tensors) == set(tensors)  # whole numbers are no weights
    for name, tensor in tensors.items():
        assert mapped.tensors[name].dtype == tensor.dtype and torch.equal(mapped.tensors[name], tensor)


def test_what_is_written_to_one_is_in_the_file_and_in_nothing_else(written):
    tensors, file = written
    mapped, other = MappedWeights(file), MappedWeights(file)
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
    assert not MappedWeights(file).tensors


def test_a_file_that_took_its_place_is_another(written, tmp_path):
    _, file = written
    mapped = MappedWeights(file)
    assert mapped.is_of(file)
    file.touch()
    assert mapped.is_of(file)
    save_file({"wide": torch.zeros(3, 5)}, tmp_path / "fresh")
    os.replace(tmp_path / "fresh", file)
    assert not mapped.is_of(file)
    assert mapped.tensors["wide"].abs().sum() > 0  # the old one's memory is still there


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x02\0\0\0\0\0\0\0{]", b"\x02\0\0\0\0\0\0\0{}"[:9]])
def test_what_is_no_file_of_weights_is_named(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'w'} cannot be mapped")):
        MappedWeights(tmp_path / "w")


def test_a_file_whose_end_is_missing_is_named(written):
    _, file = written
    os.truncate(file, file.stat().st_size - 40)
    with pytest.raises(OSError, match="cannot be mapped"):
        MappedWeights(file)


@pytest.fixture
def in_memory():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def calls(monkeypatch):
    """What CUDA is told, and whether the memory is still there when it is."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        mapped_weights, "_register", lambda bytes_: told.append(("register", is_mapped(bytes_.data_ptr()))) or True
    )
    monkeypatch.setattr(mapped_weights, "_unregister", lambda address: told.append(("unregister", is_mapped(address))))
    return told


def is_mapped(address):
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


def test_memory_is_given_back_to_cuda_before_it_is_unmapped(in_memory, calls):
    """Of a file without one tensor that could hold the mapping, too."""
    for tensors in ({"w": torch.ones(3)}, {"steps": torch.tensor([3])}):
        save_file(tensors, in_memory / "w.safetensors")
        mapped = MappedWeights(in_memory / "w.safetensors")
        mapped.register()
        mapped.register()
        assert mapped.is_registered and calls == [("register", True)]
        del mapped
        assert calls == [("register", True), ("unregister", True)]
        calls.clear()


def test_a_file_on_a_disk_is_not_registered(written, calls):
    mapped = MappedWeights(written[1])
    mapped.register()
    assert not mapped.is_registered and not calls


def test_a_worker_registers_what_is_loaded_again_and_sees_a_new_file(written, in_memory, calls, monkeypatch):
    tensors, file = written
    monkeypatch.setattr(vllm_worker, "_mapped", [])
    place = Path(shutil.copy(file, in_memory / "w.safetensors"))
    found = dict(vllm_worker._weights(str(place)))
    assert not calls, "one copy is made sooner than the memory is registered"
    assert set(found) == {*tensors, "steps"} and int(found["steps"]) == 3
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    MappedWeights(place).tensors["narrow"].fill_(2)
    assert dict(vllm_worker._weights(str(place)))["narrow"].unique().tolist() == [2]
    assert calls == [("register", True)]
    save_file({"wide": torch.zeros(3, 5)}, in_memory / "fresh")
    os.replace(in_memory / "fresh", place)
    assert {name: tensor.sum() for name, tensor in vllm_worker._weights(str(place))} == {"wide": 0}
    del found
    assert calls == [("register", True), ("unregister", True)]
