"""Served labels against the same model called directly, for every family; alone, in company, in any order of lengths.

Tolerances: float32 models 2e-4 on logits of magnitude ~10 (padding and batching change the order of sums);
bfloat16 models 0.15, about three steps of bfloat16 at that magnitude.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.labels.device_transfer import LabelTensors, to_torch
from student_trainer.labels.rows_on_device import head_on
from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import TransformersBackend
from teacher_server.errors import ServerConfigError
from teacher_server.signals.reduce import OutputHead
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import Tensor
from teacher_wire.score.signals import spec_of
from tests.tiny import head_of

FAMILIES = ["qwen2", "llama", "internlm3", "glm", "glm4", "gemma2", "cohere", "granite"]
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.15}
LENGTHS = (3, 40, 2, 17, 39, 8)


def sequences(seed=0, lengths=LENGTHS, vocab=300):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def backend(folder, dtype="float32", deterministic=False, **changes):
    return load(
        TransformersBackend(model=str(folder), dtype=dtype, device="cpu", **changes), deterministic=deterministic
    )


def direct_logits(folder, rows, dtype="float32"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0, :-1].float() for row in rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_equal_the_model_called_directly(model_factory, family, dtype):
    folder = model_factory(family)
    teacher = backend(folder, dtype)
    rows = sequences()
    batch = TokenBatch.pack(rows)
    expected = direct_logits(folder, rows, dtype)
    near = {"atol": TOLERANCE[dtype], "rtol": 0}
    hidden, full, top = teacher.score(
        [(batch, spec_of("hidden", 300)), (batch, spec_of("full", 300)), (batch, spec_of("top_k", 300, k=9))]
    )
    head = head_on(head_of(teacher), 300, torch.device("cpu"))
    torch.testing.assert_close(head.logits(to_torch(hidden["hidden_ND"])).float(), expected, **near)
    served = to_torch(full["logits_NV"]).float()
    torch.testing.assert_close(served, expected, **near)
    logp = served.double().log_softmax(-1)
    torch.testing.assert_close(to_torch(full.lse_N).double(), served.double().logsumexp(-1), atol=1e-4, rtol=0)
    labels = torch.from_numpy(batch.labels_N()).long()
    torch.testing.assert_close(
        to_torch(full.label_logp_N).double(), logp.gather(-1, labels[:, None])[:, 0], atol=1e-4, rtol=0
    )
    # top-k: ids and values exactly those of the served distribution, tail mass within 1e-4
    order = np.lexsort((np.broadcast_to(np.arange(300), served.shape), -served.numpy()), axis=-1)[:, :9]
    np.testing.assert_array_equal(top["topk_ids_NK"].array, order)
    np.testing.assert_array_equal(top["topk_logits_NK"].as_float32(), np.take_along_axis(served.numpy(), order, -1))
    kept = logp.exp().gather(-1, torch.from_numpy(order.copy())).sum(-1)
    np.testing.assert_allclose(np.exp(top["tail_logp_N"].array), 1 - kept, atol=1e-4)


def test_alone_or_in_company_labels_agree(model_factory):
    teacher = backend(model_factory("qwen2"))
    rows = sequences()
    spec = spec_of("full", 300)
    (together,) = teacher.score([(TokenBatch.pack(rows), spec)])
    shared = teacher.score([(TokenBatch.pack([row]), spec) for row in rows])
    alone = [teacher.score([(TokenBatch.pack([row]), spec)])[0] for row in rows]
    for parts in (shared, alone):
        joined = np.concatenate([part["logits_NV"].array for part in parts])
        np.testing.assert_allclose(joined, together["logits_NV"].array, atol=TOLERANCE["float32"])


SPECS = [
    spec_of("full", 300),
    spec_of("top_k", 290, k=5),
    spec_of("top_k", 300, k=5, extra=2),
    spec_of("hidden", 300),
    spec_of("hidden", 300, reduction="int8"),
    spec_of("hidden", 300, "sampled"),
]


def by_sequence(signals, batch, rows):
    """The bytes of each sequence's answer, by its ids."""
    parts = signals.cut(batch)
    return {
        tuple(row): {n: t.array.tobytes() for n, t in part.tensors.items()}
        for row, part in zip(rows, parts, strict=True)
    }


@pytest.mark.parametrize("settings", [{}, {"layers": "fused"}, {"packing": "off"}], ids=["packed", "fused", "padded"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.signals} {s.check}")
def test_deterministic_labels_are_a_function_of_the_sequence_alone(model_factory, spec, settings):
    """Bit for bit: alone, in any company, in any order, with other specs beside it, whatever other rows are wanted."""
    teacher = backend(model_factory("qwen2"), deterministic=True, reduce_mb=1, **settings)
    teacher._chunk_bytes = 16 * 4 * spec.vocab_rows  # several chunks a sequence
    prompt = [1, 2, 3] * 30
    rows = [*sequences(vocab=290), [*prompt, 4, 5], [*prompt, 6, 7, 8]]

    def ask(rows, wanted=None):
        extra = None
        if spec.extra_ids:
            extra = np.concatenate([np.array([row[:-1], row[1:]]).T for row in rows]).astype(np.int32)
            extra[:, 1] = np.where(extra[:, 0] == extra[:, 1], (extra[:, 0] + 1) % 290, extra[:, 1])
        batch = TokenBatch.pack(rows)
        return TokenBatch(batch.token_ids_T, batch.cu_lengths_B1, batch.wanted_T, extra)

    alone = {}
    for row in rows:
        alone |= by_sequence(teacher.score([(ask([row]), spec)])[0], ask([row]), [row])
    for company in (rows, rows[::-1], [rows[2], rows[6], rows[2], rows[1]]):
        batch = ask(company)
        for jobs in ([(batch, spec)], [(TokenBatch.pack(rows[:3]), SPECS[0]), (batch, spec), (ask(rows[:1]), spec)]):
            answers = teacher.score(jobs)
            answer = answers[len(jobs) // 2]
            for row, found in by_sequence(answer, batch, company).items():
                assert found == alone[row], f"{len(row)} tokens"
    if not spec.extra_ids:  # some rows only
        row = rows[1]
        wanted = np.arange(len(row)) % 7 == 2
        wanted[-1] = False
        (some,) = teacher.score([(TokenBatch.pack([row], [wanted]), spec)])
        (every,) = teacher.score([(ask([row]), replace(spec, check="all"))])
        of_wanted = {name: Tensor(t.dtype, t.array[wanted[:-1]]) for name, t in every.tensors.items()}
        expected = TeacherSignals(of_wanted)
        if spec.check == "sampled":
            expected = expected.sampled(TokenBatch.pack([row], [wanted]))
        assert some.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert tensor.array.tobytes() == some.tensors[name].array.tobytes(), name


@pytest.mark.parametrize("reduction", ["none", "int8"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_of_a_sample_of_rows_the_head_sees_no_others(model_factory, monkeypatch, deterministic, reduction):
    teacher = backend(model_factory("qwen2"), deterministic=deterministic)
    teacher._chunk_bytes = 8 * 4 * 300
    batches = [TokenBatch.pack(sequences(lengths=(60, 9))), TokenBatch.pack(sequences(1))]
    spec = spec_of("hidden", 300, "sampled", reduction=reduction)
    every = teacher.score([(batch, replace(spec, check="all")) for batch in batches])
    seen, make = [], OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda *a: seen.append(len(a[1])) or make(*a))
    found = teacher.score([(batch, spec) for batch in batches])
    checked = sum(int(checked_rows(batch).sum()) for batch in batches)
    rows = sum(batch.rows for batch in batches)
    assert checked < 0.3 * rows and (checked < sum(seen) < rows if deterministic else sum(seen) == checked)
    for answer, whole, batch in zip(found, every, batches, strict=True):
        expected = whole.sampled(batch)
        assert answer.tensors.keys() == expected.tensors.keys() and answer.rows == batch.rows
        for name, tensor in expected.tensors.items():
            if name in ("lse_C", "label_logp_C"):
                np.testing.assert_allclose(answer[name].array, tensor.array, atol=TOLERANCE["float32"])
            else:
                np.testing.assert_array_equal(answer[name].array, tensor.array)


def test_a_token_outside_the_specs_vocabulary_may_follow_an_unwanted_row(model_factory):
    teacher = backend(model_factory("qwen2"), deterministic=True)
    wanted = [[False, True, False, False]]
    (found,) = teacher.score([(TokenBatch.pack([[3, 299, 5, 298]], wanted), spec_of("full", 290))])
    logits = direct_logits(model_factory("qwen2"), [[3, 299, 5, 298]])[1:2, :290]
    np.testing.assert_allclose(found.label_logp_N.array, logits.log_softmax(-1)[:, 5], atol=1e-4)


def test_a_batch_may_begin_before_the_last_is_waited_for(model_factory):
    teacher = backend(model_factory("qwen2"))
    rows = sequences(vocab=290)
    jobs = [[(TokenBatch.pack([row]), SPECS[i % len(SPECS[:2])])] for i, row in enumerate(rows)]
    waits = [teacher.begin(job) for job in jobs]
    for job, wait in zip(jobs, waits, strict=True):
        (found,), (expected,) = wait(), teacher.score(job)
        for name, tensor in expected.tensors.items():
            np.testing.assert_array_equal(found.tensors[name].array, tensor.array)
        assert found.timing.batch_tokens == job[0][0].tokens and found.timing.forward_us > 0


def test_requests_of_several_kinds_share_a_pass(model_factory):
    """Each gets its own rows of its own kind, in the order of the jobs."""
    teacher = backend(model_factory("qwen2"))
    rows = sequences(vocab=290)
    kinds = [SPECS[0], SPECS[3], SPECS[1], SPECS[0], SPECS[4], SPECS[1]]
    together = teacher.score([(TokenBatch.pack([row]), spec) for row, spec in zip(rows, kinds, strict=True)])
    for row, spec, found in zip(rows, kinds, together, strict=True):
        (alone,) = teacher.score([(TokenBatch.pack([row]), spec)])
        assert found.rows == len(row) - 1 and set(found.tensors) == set(alone.tensors)
        np.testing.assert_allclose(found.lse_N.array, alone.lse_N.array, atol=TOLERANCE["float32"])


def test_row_t_describes_token_t_plus_1(model_factory):
    """Three tokens, two rows; the label of row 0 is token 1."""
    folder = model_factory("qwen2")
    (signals,) = backend(folder).score([(TokenBatch.pack([[5, 77, 200]]), spec_of("full", 300))])
    logp = direct_logits(folder, [[5, 77, 200]]).log_softmax(-1)
    np.testing.assert_allclose(signals.label_logp_N.array, [logp[0, 77], logp[1, 200]], atol=1e-4)


def test_only_wanted_rows_come_back(model_factory):
    teacher = backend(model_factory("qwen2"))
    rows = sequences(lengths=(6, 5))
    wanted = [[False, True, False, True, False, False], [True, False, False, False, False]]
    (some,) = teacher.score([(TokenBatch.pack(rows, wanted), spec_of("full", 300))])
    (every,) = teacher.score([(TokenBatch.pack(rows), spec_of("full", 300))])
    np.testing.assert_allclose(some["logits_NV"].array, every["logits_NV"].array[[1, 3, 5]], atol=TOLERANCE["float32"])


def test_a_smaller_vocabulary_is_renormalised(model_factory):
    """Qwen2.5-7B has 152,064 rows and 1.5B 151,936: the distribution is over the shared ones (docs/concepts/method.md 1.6)."""
    teacher = backend(model_factory("qwen2"))
    batch = TokenBatch.pack([[5, 7, 11, 13]])
    (small,) = teacher.score([(batch, spec_of("full", 280))])
    (whole,) = teacher.score([(batch, spec_of("full", 300))])
    logits = whole["logits_NV"].array[:, :280].astype(np.float64)
    np.testing.assert_allclose(small.lse_N.array, np.log(np.exp(logits).sum(-1)), atol=1e-4)


def test_compressed_states_carry_the_figures_of_what_travels(model_factory):
    """The student's integrity check must hold to float32 accuracy although the state is rounded."""
    teacher = backend(model_factory("qwen2", hidden=160))
    batch = TokenBatch.pack(sequences())
    exact, packed = teacher.score([(batch, spec_of("hidden", 300)), (batch, spec_of("hidden", 300, reduction="int8"))])
    head = head_on(head_of(teacher), 300, torch.device("cpu"))
    seen = head.logits(LabelTensors.of(packed).state(torch.float32))
    np.testing.assert_allclose(packed.lse_N.array, seen.logsumexp(-1), atol=1e-4)
    true = head.logits(LabelTensors.of(exact).state(torch.float32)).double().log_softmax(-1)
    kl = (true.exp() * (true - seen.double().log_softmax(-1))).sum(-1)
    assert 0 < kl.mean() < 2e-3
    assert packed.payload_bytes < 0.5 * exact.payload_bytes


def test_chunked_reductions_change_nothing(model_factory):
    folder = model_factory("qwen2")
    batch = TokenBatch.pack(sequences(lengths=(120, 100)))
    one = backend(folder)
    one._chunk_bytes = 0  # a row at a time
    (tiny,) = one.score([(batch, spec_of("top_k", 300, k=4))])
    (big,) = backend(folder).score([(batch, spec_of("top_k", 300, k=4))])
    np.testing.assert_array_equal(tiny["topk_ids_NK"].array, big["topk_ids_NK"].array)
    np.testing.assert_allclose(tiny.lse_N.array, big.lse_N.array, atol=1e-5)


def test_the_fingerprint_is_of_weights_configuration_and_dtype(model_factory, tmp_path):
    folder = model_factory("qwen2")
    same, wide = backend(folder).facts.fingerprint, backend(folder, "bfloat16").facts.fingerprint
    assert same == backend(folder).facts.fingerprint != wide
    assert backend(model_factory("qwen2", seed=1)).facts.fingerprint != same
    assert len(bytes.fromhex(same)) == hashlib.sha256().digest_size


def test_a_teacher_may_keep_its_head(model_factory):
    teacher = backend(model_factory("qwen2"), serve_head=False)
    assert teacher.facts.transports == ("top_k", "full", "layers", "attention", "relation", "ffn", "given")
    assert teacher.facts.artifacts == ()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded|tokenizer"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), "nonesuch"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "model.safetensors"),
    ],
)
def test_a_broken_folder_is_one_clear_line(model_factory, tmp_path, spoil, named):
    import shutil

    folder = shutil.copytree(model_factory("qwen2"), tmp_path / "model")
    spoil(folder)
    with pytest.raises(ServerConfigError, match=named) as caught:
        backend(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_device_are_named():
    with pytest.raises(ServerConfigError, match="/no/such/folder"):
        backend("/no/such/folder")
