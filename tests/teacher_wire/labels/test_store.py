"""Labels on disk: what comes out is bit for bit what went in, under the key of exactly what was asked; or nothing."""

import dataclasses
import errno
import hashlib
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError, RequestError
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.labels import blob
from teacher_wire.labels.blob import decode_labels, encode_labels
from teacher_wire.labels.store import LabelStore, label_keys
from teacher_wire.score.signals import Full, Hidden, spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from tests.teacher_wire.labels.labels_of import SPECS, assert_same_labels, entry_of, key_of


@pytest.fixture
def store(tmp_path):
    return LabelStore(tmp_path / "labels")


def put(store, entry):
    return store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals)


def files_of(store):
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------- sequences of a batch


@given(st.data())
def test_selected_sequences_keep_their_tokens_rows_and_named_ids(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    lengths = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    wanted = rng.random(cu[-1]) < 0.4
    wanted[cu[1:] - 1] = False
    if not wanted.any():
        wanted[0] = True
    extra = np.stack([rng.permutation(9)[:3] for _ in range(int(wanted.sum()))]).astype(np.int32)
    batch = TokenBatch(rng.integers(0, 50, cu[-1]).astype(np.int32), cu, wanted, extra)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    bounds = batch.row_bounds_B1
    assert bounds.dtype == np.int64 and bounds[-1] == batch.rows
    if not sum(int(bounds[b + 1] - bounds[b]) for b in chosen):
        with pytest.raises(RequestError):
            batch.select(chosen)
        return
    part = batch.select(chosen)
    expected_rows = [row for b in chosen for row in range(bounds[b], bounds[b + 1])]
    assert part.labels_N().tolist() == batch.labels_N()[expected_rows].tolist()
    assert part.extra_ids_NM.tolist() == extra[expected_rows].tolist()
    for place, b in enumerate(chosen):
        mine = slice(part.cu_lengths_B1[place], part.cu_lengths_B1[place + 1])
        assert part.token_ids_T[mine].tolist() == batch.token_ids_T[cu[b] : cu[b + 1]].tolist()
    for row in range(batch.rows):
        b = batch.sequence_of_row(row)
        assert bounds[b] <= row < bounds[b + 1]


def test_a_sequence_that_is_not_there_is_refused():
    for number in (-1, 2):
        with pytest.raises(RequestError, match="no such sequence"):
            TokenBatch.pack([[1, 2], [3, 4]]).select([0, number])


def test_labels_of_selected_sequences_are_the_slices_of_the_whole_answer():
    """What the cache relies on: rows [bounds[b], bounds[b+1]) are sequence b's."""
    fake, spec = FakeTeacher(), spec_of("hidden", 64)
    batch = TokenBatch.pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    whole = fake.signals(spec, batch)
    parts = [whole.cut(batch)[b] for b in (2, 0)]
    expected = fake.signals(spec, batch.select([2, 0]))["hidden_ND"].array
    np.testing.assert_array_equal(TeacherSignals.join(parts)["hidden_ND"].array, expected)


# ----------------------------------------------------------------------- keys


def variants(entry):
    """The same question with one thing changed."""
    yield "fingerprint", dataclasses.replace(entry, fingerprint="e" * 64)
    yield "fingerprint's end", dataclasses.replace(entry, fingerprint="f" * 63)
    spec = entry.spec
    for field in dataclasses.fields(SignalSpec):
        signal = spec.signals[0]
        others = {
            "signals": [
                (Full(),),
                (Hidden(),),
                (Hidden("int8"),),
                (dataclasses.replace(signal, k=signal.k + 1),),
                (dataclasses.replace(signal, extra=signal.extra + 1),),
                (signal, Hidden()),
                (Hidden(), signal),
            ],
            "vocab_rows": [spec.vocab_rows - 1],
            "check": [],  # of a spec that may have a sample checked, below
        }
        for number, other in enumerate(others[field.name]):  # a new field must be added here
            changed = dataclasses.replace(spec, **{field.name: other})
            yield f"{field.name} {number}", dataclasses.replace(entry, spec=changed)
    yield "check", dataclasses.replace(entry, spec=spec_of("hidden", spec.vocab_rows, "sampled"))
    batch = entry.sequence
    ids, wanted, extra = batch.token_ids_T.copy(), batch.wanted_T.copy(), batch.extra_ids_NM.copy()
    ids[-1] += 1
    yield "last id", dataclasses.replace(entry, sequence=dataclasses.replace(batch, token_ids_T=ids))
    moved = int(np.argmin(wanted[:-1]))
    assert not wanted[moved], "a row that is not wanted"
    wanted[[0, moved]] = wanted[[moved, 0]]
    yield "wanted", dataclasses.replace(entry, sequence=dataclasses.replace(batch, wanted_T=wanted))
    extra[-1, -1] = 50
    yield "extra ids", dataclasses.replace(entry, sequence=dataclasses.replace(batch, extra_ids_NM=extra))
    yield "no extra ids", dataclasses.replace(entry, sequence=dataclasses.replace(batch, extra_ids_NM=None))


def test_a_key_changes_with_everything_that_was_asked():
    entry = entry_of(SPECS["named"], tokens=12)
    keys = {"": key_of(entry)} | {name: key_of(other) for name, other in variants(entry)}
    assert len(set(keys.values())) == len(keys), keys
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys.values())


def test_a_key_does_not_depend_on_what_else_was_asked():
    entries = [entry_of(SPECS["named"], seed=seed, tokens=4 + seed) for seed in range(3)]
    cu = np.cumsum([0, *(e.sequence.tokens for e in entries)]).astype(np.int32)
    columns = zip(
        *((e.sequence.token_ids_T, e.sequence.wanted_T, e.sequence.extra_ids_NM) for e in entries), strict=True
    )
    ids, wanted, extra = (np.concatenate(column) for column in columns)
    together = label_keys("f" * 64, SPECS["named"], TokenBatch(ids, cu, wanted, extra))
    assert together == [key_of(e) for e in entries]


def test_the_key_of_today_is_the_key_of_tomorrow():
    """A cache is worth nothing if keys change unseen; if this recipe must change, so must label_blob.FORMAT."""
    batch = TokenBatch.pack([[1, 2, 3]])
    spec = b'{"compression": "none", "extra": 0, "k": 4, "transport": "top_k", "vocab_rows": 100}'
    parts = [b"lyceum-label/1", b"teacher", spec, struct.pack("<3i", 1, 2, 3), b"\1\1\0", b""]
    recipe = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    assert label_keys("teacher", spec_of("top_k", 100, k=4), batch) == [hashlib.sha256(recipe).hexdigest()]


# ----------------------------------------------------------------------- blobs


@given(
    name=st.sampled_from(sorted(SPECS)),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    tokens=st.integers(2, 20),
    seed=st.integers(0, 10_000),
)
def test_what_is_kept_comes_back_bit_for_bit(name, dtype, tokens, seed):
    entry = entry_of(SPECS[name], seed=seed, tokens=tokens, dtype=dtype)
    found = decode_labels(key_of(entry), encode_labels(key_of(entry), entry))
    assert_same_labels(found, entry.signals)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_rows_that_came_off_the_wire_as_views_are_kept(store, name):
    """Slices of one answer, read-only and not at the start of their buffer, as the feed has them."""
    entry = entry_of(SPECS[name], tokens=9)
    twice = TeacherSignals.join([entry.signals, entry.signals])
    for tensor in twice.tensors.values():
        tensor.array.flags.writeable = False
    mine = dataclasses.replace(entry, signals=twice.divide([entry.sequence] * 2)[1])
    put(store, mine)
    assert_same_labels(store.get(key_of(entry)), entry.signals)


def test_24_bit_ids_take_three_bytes():
    wide, narrow = (entry_of(spec_of("top_k", rows, k=100), tokens=50) for rows in (70_000, 60_000))
    sizes = [len(encode_labels(key_of(entry), entry)) for entry in (wide, narrow)]
    rows = wide.sequence.rows
    assert rows * 100 - 64 < sizes[0] - sizes[1] < rows * 100 + 64


@pytest.mark.parametrize("name", ["int8", "named"])
def test_every_flipped_bit_is_found(name):
    """In the length, the header, the metadata and every tensor: one bit of each byte."""
    entry = entry_of(SPECS[name])
    key, data = key_of(entry), encode_labels(key_of(entry), entry)
    rng = np.random.default_rng(0)
    for place in range(len(data)):
        spoilt = bytearray(data)
        spoilt[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(LabelError):
            decode_labels(key, bytes(spoilt))


def test_every_truncation_and_anything_behind_the_end_is_found():
    entry = entry_of(SPECS["named"])
    key, data = key_of(entry), encode_labels(key_of(entry), entry)
    for length in range(len(data)):
        with pytest.raises(LabelError):
            decode_labels(key, data[:length])
    with pytest.raises(LabelError):
        decode_labels(key, data + b"\0")


def test_labels_that_do_not_belong_together_are_not_kept(store):
    entry, other = entry_of(SPECS["hidden"]), entry_of(SPECS["hidden"], seed=1, tokens=12)
    with pytest.raises(LabelError, match="not the labels of this key"):
        store.keep(key_of(other), entry.fingerprint, entry.spec, entry.sequence, entry.signals)
    with pytest.raises(LabelError, match="rows"):
        store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, other.signals)
    two = TokenBatch.pack([[1, 2], [3, 4]])
    with pytest.raises(LabelError, match="one sequence"):
        store.keep(label_keys("", entry.spec, two)[0], "", entry.spec, two, FakeTeacher().signals(entry.spec, two))
    assert not store.folder.exists()


# ----------------------------------------------------------------------- the folder


def test_hits_and_misses_are_counted(store):
    entry = entry_of(SPECS["top_k"])
    assert store.get(key_of(entry)) is None
    assert put(store, entry) is entry.signals
    assert_same_labels(store.get(key_of(entry)), entry.signals)
    stats = store.stats
    assert (stats.hits, stats.misses, stats.written, stats.damaged) == (1, 1, 1, 0)
    (file,) = files_of(store)
    assert stats.written_bytes == stats.read_bytes == file.stat().st_size
    assert file == store.folder / key_of(entry)[:2] / f"{key_of(entry)}.safetensors"


SPOILS = {
    "flipped": lambda data: data[:-5] + bytes([data[-5] ^ 4]) + data[-4:],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a header alone": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "endless header": lambda data: b"\xff" * 8 + data[8:],
    "not safetensors": lambda data: b"hello, world" * 100,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_file_is_deleted_counted_and_made_again(store, spoil):
    entry = entry_of(SPECS["hidden"])
    put(store, entry)
    (file,) = files_of(store)
    file.write_bytes(spoil(file.read_bytes()))
    assert store.get(key_of(entry)) is None
    assert not file.exists() and (store.stats.damaged, store.stats.misses) == (1, 1)
    put(store, entry)
    assert_same_labels(store.get(key_of(entry)), entry.signals)


def test_a_whole_file_under_a_wrong_key_is_refused(store):
    entry, other = entry_of(SPECS["hidden"]), entry_of(SPECS["hidden"], seed=1)
    put(store, entry)
    (file,) = files_of(store)
    wrong = store.folder / key_of(other)[:2] / f"{key_of(other)}.safetensors"
    wrong.parent.mkdir(exist_ok=True)
    file.rename(wrong)
    assert store.get(key_of(other)) is None and store.stats.damaged == 1


def test_the_first_writer_wins(tmp_path):
    """Another process has kept other bits meanwhile: everybody goes on with those."""
    first, second = LabelStore(tmp_path), LabelStore(tmp_path)
    entry = entry_of(SPECS["hidden"])
    other_bits = dataclasses.replace(entry, signals=entry_of(SPECS["hidden"], seed=0, dtype="float16").signals)
    put(first, entry)
    assert_same_labels(put(second, other_bits), entry.signals)
    assert_same_labels(second.get(key_of(entry)), entry.signals)
    assert (second.stats.written, second.stats.overtaken, first.stats.written) == (0, 1, 1)
    assert len(files_of(first)) == 1


def test_a_torn_file_in_the_way_is_replaced(store):
    entry = entry_of(SPECS["hidden"])
    put(store, entry)
    (file,) = files_of(store)
    file.write_bytes(b"")
    assert put(store, entry) is entry.signals
    assert store.stats.damaged == 1
    assert_same_labels(store.get(key_of(entry)), entry.signals)


def test_threads_agree_on_one_answer(store):
    """Eight threads keep different bits under one key at the same instant, many times over."""
    variants_of = [
        [dataclasses.replace(entry_of(SPECS["hidden"], seed=seed), signals=signals) for signals in _lookalikes(seed)]
        for seed in range(20)
    ]
    together = threading.Barrier(8)
    seen: list[list[bytes]] = [[] for _ in variants_of]

    def write(thread: int) -> None:
        for place, choices in enumerate(variants_of):
            together.wait()
            seen[place].append(put(store, choices[thread])["hidden_ND"].array.tobytes())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(bits) == 8 and len(set(bits)) == 1 for bits in seen)
    assert store.stats.written == 20 and store.stats.overtaken == 140 and len(files_of(store)) == 20


def _lookalikes(seed):
    """Eight answers to one question that differ in their bits."""
    signals = entry_of(SPECS["hidden"], seed=seed).signals
    for number in range(8):
        hidden = dataclasses.replace(signals["hidden_ND"], array=np.full_like(signals["hidden_ND"].array, number))
        yield dataclasses.replace(signals, tensors=signals.tensors | {"hidden_ND": hidden})


def test_without_hard_links_labels_are_kept_all_the_same(store, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    entry = entry_of(SPECS["hidden"])
    assert put(store, entry) is entry.signals
    assert_same_labels(store.get(key_of(entry)), entry.signals)
    assert store.stats.written == 1 and len(files_of(store)) == 1
    put(store, entry)
    assert store.stats.overtaken == 1


# ----------------------------------------------------------------------- budget


def age(store, entry, seconds):
    path = store.folder / key_of(entry)[:2] / f"{key_of(entry)}.safetensors"
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def test_the_longest_unused_go_first_and_the_budget_is_kept(tmp_path):
    entries = [entry_of(SPECS["hidden"], seed=seed) for seed in range(40)]
    size = max(len(encode_labels(key_of(e), e)) for e in entries)
    budget = 20 * size
    store = LabelStore(tmp_path, max_bytes=budget)
    for place, entry in enumerate(entries[:15]):
        put(store, entry)
        age(store, entry, 1000 - place)
    used = entries[:3]
    assert all(store.get(key_of(entry)) is not None for entry in used), "used a moment ago, though the first written"
    for entry in entries[15:25]:
        put(store, entry)
        assert sum(path.stat().st_size for path in files_of(store)) <= budget
    there = {path.name.removesuffix(".safetensors") for path in files_of(store)}
    assert {key_of(e) for e in [*used, *entries[15:25]]} <= there
    assert key_of(entries[3]) not in there and key_of(entries[4]) not in there
    assert store.stats.evicted == 25 - len(there) and store.stats.evicted_bytes > 0
    again = LabelStore(store.folder, 10**9)
    assert again.used_bytes == 0
    again.look()
    assert again.used_bytes == store.used_bytes == sum(f.stat().st_size for f in store.folder.rglob("*.safetensors"))
    assert len(there) * size > 0.8 * budget, "no more went than had to"


def test_a_blob_above_the_budget_is_not_kept_and_said_once(tmp_path):
    told = []
    store = LabelStore(tmp_path, max_bytes=100, on_trouble=told.append)
    for seed in range(3):
        entry = entry_of(SPECS["hidden"], seed=seed)
        assert put(store, entry) is entry.signals
    assert len(told) == 1 and "budget of 100 bytes" in told[0] and store.stats.unwritten == 3
    assert not files_of(store)


def test_temporary_files_are_no_entries_and_go_when_they_are_old(store):
    entry = entry_of(SPECS["hidden"])
    put(store, entry)
    (file,) = files_of(store)
    young, old = (file.with_name(f".{key_of(entry)[:16]}.{name}.partial") for name in ("1.aa", "2.bb"))
    for partial in (young, old):
        partial.write_bytes(file.read_bytes())
    os.utime(old, (1, 1))
    shelves, unreadable = store.scan()
    assert [shelf.sequences for shelf in shelves] == [1] and unreadable == 0
    assert young.exists() and not old.exists()
    assert store.verify()[0].sequences == 1


# ----------------------------------------------------------------------- upkeep


@pytest.fixture
def filled(store):
    """Two teachers; three sequences by hidden and two by top_k of the first, one of the second."""
    for spec, fingerprint, seeds in (("hidden", "aa", 3), ("top_k", "aa", 2), ("hidden", "bb", 1)):
        for seed in range(seeds):
            put(store, entry_of(SPECS[spec], seed=seed, fingerprint=fingerprint * 32))
    return store


def test_a_scan_counts_by_teacher_and_transport(filled):
    shelves, unreadable = filled.scan()
    found = {(s.fingerprint[:2], s.transport): (s.sequences, s.tokens, s.bytes, s.rows) for s in shelves}
    assert {name: counts[:2] for name, counts in found.items()} == {
        ("aa", "hidden"): (3, 18), ("aa", "top_k"): (2, 12), ("bb", "hidden"): (1, 6)
    }  # fmt: skip
    assert sum(counts[2] for counts in found.values()) == sum(path.stat().st_size for path in files_of(filled))
    assert found["bb", "hidden"][3] == entry_of(SPECS["hidden"], fingerprint="bb" * 32).sequence.rows
    files_of(filled)[0].write_bytes(b"")
    assert filled.scan()[1] == 1 and unreadable == 0


def test_verify_deletes_what_is_damaged(filled):
    spoilt = files_of(filled)[2]
    data = bytearray(spoilt.read_bytes())
    data[-1] ^= 1
    spoilt.write_bytes(data)
    seen = []
    whole, damaged = filled.verify(lambda done, total: seen.append((done, total)))
    assert (whole.sequences, damaged.sequences) == (5, 1) and not spoilt.exists()
    assert seen[-1][0] == seen[-1][1] > 0 and len(seen) == 6
    assert filled.verify()[1].sequences == 0


def test_prune_deletes_what_fits_every_condition(filled):
    everything = files_of(filled)
    assert filled.prune(teacher="aa", dry_run=True).sequences == 5
    assert files_of(filled) == everything, "a dry run deletes nothing"
    assert filled.prune(teacher="cc").sequences == 0
    assert filled.prune(unused_for_s=100).sequences == 0
    for path in everything[:2]:
        os.utime(path, (1, 1))
    assert filled.prune(unused_for_s=100).sequences == 2
    left = files_of(filled)
    total = sum(path.stat().st_size for path in left)
    freed = filled.prune(max_bytes=total - 1)
    assert freed.sequences == 1 and len(files_of(filled)) == 3
    newest = max(path.stat().st_mtime for path in files_of(filled))
    assert filled.prune(used_since_s=newest + 1).sequences == 0
    assert filled.prune(used_since_s=1).sequences == 3 and not files_of(filled)


def test_export_copies_what_is_whole(filled, tmp_path):
    spoilt = files_of(filled)[0]
    spoilt.write_bytes(b"torn")
    target = LabelStore(tmp_path / "usb")
    copied, damaged = filled.export(target)
    assert (copied.sequences, damaged.sequences) == (5, 1)
    assert [p.name for p in files_of(target)] == [p.name for p in files_of(filled)]
    assert target.verify()[0].sequences == 5
    again, _ = filled.export(target)
    assert again.sequences == 0, "what is there already stays"
    only = LabelStore(tmp_path / "one")
    copied, _ = filled.export(only, teacher="bb")
    assert copied.sequences == sum(s.sequences for s in filled.scan()[0] if s.fingerprint.startswith("bb"))


def test_an_empty_or_missing_folder_is_an_empty_store(tmp_path):
    store = LabelStore(tmp_path / "nothing" / "here")
    assert store.scan() == ([], 0) and store.get("0" * 64) is None
    assert store.verify()[0].sequences == store.prune(max_bytes=0).sequences == 0
    assert not Path(store.folder).exists(), "looking makes nothing"


def test_the_same_labels_are_the_same_file(tmp_path):
    """In other processes too: whoever computes a digest over a folder must not see what is not there."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from teacher_wire.testing.fake_teacher import FakeTeacher\n"
        "from teacher_wire.labels.blob import LabelEntry, encode_labels, label_keys\n"
        "from teacher_wire.core.batch import TokenBatch\n"
        "from teacher_wire.score.signals import Full, Hidden, spec_of\n"
        "import hashlib\n"
        "spec, batch = spec_of('top_k', 64, k=3), TokenBatch.pack([[1, 2, 3]])\n"
        "entry = LabelEntry('f', spec, batch, FakeTeacher().signals(spec, batch))\n"
        "print(hashlib.sha256(encode_labels(label_keys('f', spec, batch)[0], entry)).hexdigest())\n"
    )
    proto = str(Path(blob.__file__).parents[1])
    digests = {
        subprocess.run([sys.executable, "-c", code, proto], capture_output=True, text=True, check=True).stdout
        for _ in range(6)
    }
    assert len(digests) == 1


def test_what_cannot_be_written_is_told_and_not_counted_as_kept(tmp_path):
    """The folder became a file after it was looked at; and of two writers of one sequence only one has written."""
    first, second = (LabelStore(tmp_path / "labels", 1 << 20) for _ in range(2))
    first.look()
    second.look()
    entry = entry_of(next(iter(SPECS.values())))
    put(first, entry)
    size = first.used_bytes
    assert size > 0 and first.trouble == ""
    put(first, entry)
    assert first.used_bytes == size and first.stats.overtaken == 1
    for path in files_of(second):
        path.unlink()
    for shelf in list(second.folder.iterdir()):
        shelf.rmdir()
    second.folder.rmdir()
    second.folder.write_text("not a folder")
    put(second, entry)
    assert "not a" in second.trouble.lower() and "no more are kept" in second.trouble
    assert second.used_bytes == 0 and second.stats.unwritten == 1
