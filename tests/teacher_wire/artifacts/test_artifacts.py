"""Artifacts as messages: a kind is a plug-in, its digest a fixed rule, and a header that cannot be is refused before its bytes."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

from student_trainer.teachers.artifact_cache import fetch_artifact
from student_trainer.teachers.artifact_files import artifact_folders
from teacher_wire.artifacts import codec, kinds
from teacher_wire.artifacts.kinds.base import ArtifactKind
from teacher_wire.artifacts.kinds.byte_table import ByteTableKind
from teacher_wire.artifacts.kinds.layer_basis import LayerBasisKind
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD, OutputHeadKind, TeacherHead
from teacher_wire.core.errors import CapabilityError, LabelError
from teacher_wire.core.identity import head_sha256
from teacher_wire.core.info import BYTE_TABLE, LAYER_BASIS, ArtifactInfo
from teacher_wire.core.tensor import Tensor, float32
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb

RNG = np.random.default_rng(0)
WEIGHT_VD = float32(RNG.standard_normal((64, 16)))


class SoundTable(ArtifactKind):
    """The sound of each token of a tokenizer, as a kind of its own: all that a new kind needs."""

    name = "sound_table"

    def check(self, header, info):
        shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        if set(shapes) != {"bytes", "ends_V", "part_R"} or shapes["ends_V"] != (info.tokenizer_size,):
            raise LabelError("not a sound table of this tokenizer", field="sound_table", value=shapes)


class Teacher(FakeTeacher):
    """Gives a sound table away beside its head: tensors of three dtypes, of which one starts at an odd byte."""

    def artifacts(self):
        words = [bytes([65 + i % 26] * (1 + i % 3)) for i in range(self.vocab_rows)]
        tensors = {
            "bytes": Tensor(
                "uint8", np.frombuffer(b"".join(words) + b"\x00" * (sum(map(len, words)) % 2 == 0), np.uint8)
            ),
            "ends_V": Tensor("int32", np.cumsum([len(word) for word in words], dtype=np.int32)),
            "part_R": Tensor("bfloat16", np.arange(5, dtype=np.uint16)),
        }
        return (*super().artifacts(), SoundTable().make(tensors, {"version": 1.5, "about": -0.0}))


@pytest.fixture
def sound_table(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, SoundTable.name, SoundTable())


async def test_a_new_kind_goes_over_the_wire_and_to_disk(sound_table, tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "CHUNK_BYTES", 7)  # chunks that end within an element, and across tensors
    with serve(Teacher()) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            assert [artifact.kind for artifact in info.artifacts] == [OUTPUT_HEAD, "sound_table"]
            wanted = info.artifact("sound_table")
            sent = Teacher().artifacts()[1]
            seen = []
            for _ in range(2):  # from the wire, then from disk
                found = await fetch_artifact(client, info, wanted, tmp_path, lambda *counts: seen.append(counts))
                assert found.header == sent.header and found.info == wanted
                for name, tensor in sent.tensors.items():
                    np.testing.assert_array_equal(found.tensors[name].array, tensor.array)
            assert seen[-1] == (wanted.bytes, wanted.bytes) and len(seen) == -(-wanted.bytes // 7)
    (path,) = artifact_folders(tmp_path)["sound_table"].iterdir()
    assert path.parent.name == "sound_table" and path.stem == wanted.sha256


async def test_a_kind_that_this_side_does_not_know_is_refused_by_name(tmp_path):
    with serve(Teacher()) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            with pytest.raises(CapabilityError, match=r"field=kind, value='sound_table', limit=output_head"):
                await fetch_artifact(client, info, info.artifact("sound_table"), tmp_path)
            with pytest.raises(CapabilityError, match=r"value=pca_basis, limit=output_head\|sound_table"):
                info.artifact("pca_basis")


def test_the_digest_of_a_head_is_the_one_of_version_1():
    weight_VD = float32(np.arange(6, dtype=np.float32).reshape(2, 3))
    bias_V = float32(np.ones(2))
    for bias in (None, bias_V):
        head = TeacherHead(weight_VD, bias, 0.25, 30.0)
        digest = hashlib.sha256()
        for tensor in (weight_VD, bias):
            if tensor is not None:
                digest.update(f"float32{list(tensor.shape)}".encode() + tensor.array.tobytes())
        digest.update(struct.pack("<dd", 0.25, 30.0))
        assert head.artifact().header.sha256 == digest.hexdigest() == head_sha256(weight_VD, bias, 0.25, 30.0)
        again = TeacherHead.of(head.artifact())
        assert (again.bias_V, again.logit_scale, again.final_softcap) == (bias, 0.25, 30.0)


def test_the_general_digest_is_what_the_protocol_says():
    a, b = Tensor("int32", np.arange(3, dtype=np.int32)), Tensor("uint8", np.zeros((2, 1), np.uint8))
    text = b"sound_table\nb uint8[2, 1]\n" + b.array.tobytes() + b"a int32[3]\n" + a.array.tobytes()
    text += b"x\n" + struct.pack("<d", 2.0) + b"y\n" + struct.pack("<d", 1.0)
    made = SoundTable().make({"b": b, "a": a}, {"y": 1.0, "x": 2.0})
    assert made.header.sha256 == hashlib.sha256(text).hexdigest()
    others = [({"a": a, "b": b}, {"y": 1.0, "x": 2.0}), ({"b": b, "a": a}, {"y": 2.0, "x": 1.0}), ({"b": b}, {})]
    assert len({made.header.sha256, *(SoundTable().make(*other).header.sha256 for other in others)}) == 4


def test_a_slice_is_of_the_tensors_one_after_another():
    artifact = Teacher().artifacts()[1]
    whole = b"".join(tensor.array.tobytes() for tensor in artifact.tensors.values())
    assert len(whole) == artifact.info.bytes
    for offset in range(0, len(whole) + 2, 3):
        for size in (0, 1, 5, 64, 10_000):
            assert artifact.slice(offset, size) == whole[offset : offset + size]


def chunk_of(change):
    """The header of a head with one change."""
    bias_V = float32(RNG.standard_normal(64))
    message = codec.encode_header(TeacherHead(WEIGHT_VD, bias_V).artifact().header)
    change(message.header)
    return message


HOSTILE = {
    "no tensor": lambda header: header.ClearField("tensors"),
    "no weight": lambda header: header.tensors.pop(0),
    "many tensors": lambda header: [header.tensors.add(name=str(i) * 16, dtype=pb.FLOAT32) for i in range(1000, 5000)],
    "many numbers": lambda header: [header.numbers.__setitem__(str(i) * 16, 0.0) for i in range(1000, 5000)],
    "a number with a long name": lambda header: header.numbers.__setitem__("z" * 1000, 0.0),
    "another kind": lambda header: setattr(header, "kind", "sound_table"),
    "another digest": lambda header: setattr(header, "sha256", "0" * 64),
    "a name twice": lambda header: setattr(header.tensors[1], "name", "weight_VD"),
    "another name": lambda header: setattr(header.tensors[1], "name", "bias"),
    "no name": lambda header: setattr(header.tensors[1], "name", ""),
    "a long name": lambda header: setattr(header.tensors[1], "name", "b" * 1000),
    "unprintable": lambda header: setattr(header.tensors[1], "name", "bias\n"),
    "no dtype": lambda header: setattr(header.tensors[0], "dtype", 0),
    "a dtype of tomorrow": lambda header: setattr(header.tensors[0], "dtype", 99),
    "packed ids": lambda header: setattr(header.tensors[0], "dtype", pb.UINT24),
    "integers": lambda header: setattr(header.tensors[0], "dtype", pb.INT32),
    "more axes": lambda header: header.tensors[0].shape.extend([1, 1, 1, 1]),
    "a flat weight": lambda header: (header.tensors[0].ClearField("shape"), header.tensors[0].shape.append(1024)),
    "transposed": lambda header: header.tensors[0].shape.reverse(),
    "endless": lambda header: header.tensors[0].shape.__setitem__(0, 1 << 62),
    "a bias too long": lambda header: header.tensors[1].shape.__setitem__(0, 65),
    "a bias of two axes": lambda header: header.tensors[1].shape.append(1),
    "a million tensors": lambda header: [header.tensors.add(name=str(i)) for i in range(5000)],
    "a million numbers": lambda header: [header.numbers.__setitem__(str(i), 0.0) for i in range(5000)],
    "no scale": lambda header: header.numbers.pop("logit_scale"),
    "a third number": lambda header: header.numbers.__setitem__("z", 0.0),
    "no number": lambda header: header.numbers.__setitem__("logit_scale", float("nan")),
    "an infinite cap": lambda header: header.numbers.__setitem__("final_softcap", float("inf")),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_cannot_be_is_refused_before_its_bytes(change):
    """Also when the description agrees with it, so that only the kind's own rules can tell."""
    info, chunk = FakeTeacher().teacher_info(), chunk_of(change)
    wanted = TeacherHead(WEIGHT_VD, float32(np.zeros(64))).artifact().info
    total = sum(4 * int(np.prod(list(map(int, tensor.shape)), dtype=object)) for tensor in chunk.header.tensors)
    for told in (wanted, ArtifactInfo(OUTPUT_HEAD, chunk.header.sha256, total)):
        assembly = codec.ArtifactAssembly(info, told)
        if change is HOSTILE["another digest"] and told is not wanted:
            continue  # then it is the content that tells
        with pytest.raises(LabelError) as refused:
            assembly.take(chunk)
        assert assembly.received_bytes == 0 and not assembly._room
        assert len(str(refused.value)) < 1000


def test_a_second_header_must_be_the_first_one():
    """A call that is taken up may meet another server: halves of two artifacts never mix."""
    head = TeacherHead(WEIGHT_VD).artifact()
    assembly = codec.ArtifactAssembly(FakeTeacher().teacher_info(), head.info)
    for _ in range(2):
        assembly.take(codec.encode_header(head.header))
    other = replace(head.header, numbers={"logit_scale": 2.0, "final_softcap": 0.0})
    with pytest.raises(LabelError):
        assembly.take(codec.encode_header(other))


def test_the_kinds_are_a_visible_dict():
    assert {name: type(kind) for name, kind in kinds.KINDS.items()} == {
        OUTPUT_HEAD: OutputHeadKind,
        LAYER_BASIS: LayerBasisKind,
        BYTE_TABLE: ByteTableKind,
    }
    assert all(name == kind.name for name, kind in kinds.KINDS.items())


@pytest.mark.parametrize(
    "shape", [[1 << 62], [1 << 39, 1 << 39, 0], [41_166_215, 8_512_140, 7_464_889_010, 0], [1] * 5]
)
def test_a_shape_that_numpy_cannot_count_is_refused_whatever_it_holds(shape):
    header = pb.ArtifactHeader(kind="x", tensors=[pb.ArtifactTensor(name="t", dtype=pb.FLOAT32, shape=shape)])
    with pytest.raises(LabelError, match=r"artifact\.t\.shape"):
        codec.decode_header(header)
