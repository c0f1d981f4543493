"""Served labels against the same model called directly, for every family; alone, in company, in any order of lengths.

Tolerances: float32 models 2e-4 on logits of magnitude ~10 (padding and batching change the order of sums);
bfloat16 models 0.15, about three steps of bfloat16 at that magnitude.
"""

import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.feed.arrays import to_torch, unpack_state
from student_trainer.objective import head_on
from teacher_server.backends.transformers_backend import load
from teacher_server.config import TransformersBackend
from teacher_server.errors import ServerConfigError
from teacher_wire.messages import SignalSpec, TokenBatch

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
        [(batch, SignalSpec("hidden", 300)), (batch, SignalSpec("full", 300)), (batch, SignalSpec("top_k", 300, k=9))]
    )
    head = head_on(teacher.head(), 300, torch.device("cpu"))
    torch.testing.assert_close(head.logits(to_torch(hidden.hidden_ND)).float(), expected, **near)
    served = to_torch(full.logits_NV).float()
    torch.testing.assert_close(served, expected, **near)
    logp = served.double().log_softmax(-1)
    torch.testing.assert_close(to_torch(full.lse_N).double(), served.double().logsumexp(-1), atol=1e-4, rtol=0)
    labels = torch.from_numpy(batch.labels_N()).long()
    torch.testing.assert_close(
        to_torch(full.label_logp_N).double(), logp.gather(-1, labels[:, None])[:, 0], atol=1e-4, rtol=0
    )
    # top-k: ids and values exactly those of the served distribution, tail mass within 1e-4
    order = np.lexsort((np.broadcast_to(np.arange(300), served.shape), -served.numpy()), axis=-1)[:, :9]
    np.testing.assert_array_equal(top.topk_ids_NK.array, order)
    np.testing.assert_array_equal(top.topk_logits_NK.as_float32(), np.take_along_axis(served.numpy(), order, -1))
    kept = logp.exp().gather(-1, torch.from_numpy(order.copy())).sum(-1)
    np.testing.assert_allclose(np.exp(top.tail_logp_N.array), 1 - kept, atol=1e-4)


def test_alone_or_in_company_labels_agree(model_factory):
    teacher = backend(model_factory("qwen2"))
    rows = sequences()
    spec = SignalSpec("full", 300)
    (together,) = teacher.score([(TokenBatch.pack(rows), spec)])
    shared = teacher.score([(TokenBatch.pack([row]), spec) for row in rows])
    alone = [teacher.score([(TokenBatch.pack([row]), spec)])[0] for row in rows]
    for parts in (shared, alone):
        joined = np.concatenate([part.logits_NV.array for part in parts])
        np.testing.assert_allclose(joined, together.logits_NV.array, atol=TOLERANCE["float32"])


def test_the_same_request_gives_the_same_bits(model_factory):
    teacher = backend(model_factory("qwen2"), deterministic=True)
    batch = TokenBatch.pack(sequences())
    first, second = (teacher.score([(batch, SignalSpec("hidden", 300))])[0] for _ in range(2))
    for name, tensor in first.tensors().items():
        assert tensor.array.tobytes() == second.tensors()[name].array.tobytes(), name


def test_row_t_describes_token_t_plus_1(model_factory):
    """Three tokens, two rows; the label of row 0 is token 1."""
    folder = model_factory("qwen2")
    (signals,) = backend(folder).score([(TokenBatch.pack([[5, 77, 200]]), SignalSpec("full", 300))])
    logp = direct_logits(folder, [[5, 77, 200]]).log_softmax(-1)
    np.testing.assert_allclose(signals.label_logp_N.array, [logp[0, 77], logp[1, 200]], atol=1e-4)


def test_only_wanted_rows_come_back(model_factory):
    teacher = backend(model_factory("qwen2"))
    rows = sequences(lengths=(6, 5))
    wanted = [[False, True, False, True, False, False], [True, False, False, False, False]]
    (some,) = teacher.score([(TokenBatch.pack(rows, wanted), SignalSpec("full", 300))])
    (every,) = teacher.score([(TokenBatch.pack(rows), SignalSpec("full", 300))])
    np.testing.assert_allclose(some.logits_NV.array, every.logits_NV.array[[1, 3, 5]], atol=TOLERANCE["float32"])


def test_a_smaller_vocabulary_is_renormalised(model_factory):
    """Qwen2.5-7B has 152,064 rows and 1.5B 151,936: the distribution is over the shared ones (algorithms.md 1.6)."""
    teacher = backend(model_factory("qwen2"))
    batch = TokenBatch.pack([[5, 7, 11, 13]])
    (small,) = teacher.score([(batch, SignalSpec("full", 280))])
    (whole,) = teacher.score([(batch, SignalSpec("full", 300))])
    logits = whole.logits_NV.array[:, :280].astype(np.float64)
    np.testing.assert_allclose(small.lse_N.array, np.log(np.exp(logits).sum(-1)), atol=1e-4)


def test_compressed_states_carry_the_figures_of_what_travels(model_factory):
    """The student's integrity check must hold to float32 accuracy although the state is rounded."""
    teacher = backend(model_factory("qwen2", hidden=160))
    batch = TokenBatch.pack(sequences())
    exact, packed = teacher.score(
        [(batch, SignalSpec("hidden", 300)), (batch, SignalSpec("hidden", 300, compression="int8"))]
    )
    head = head_on(teacher.head(), 300, torch.device("cpu"))
    seen = head.logits(unpack_state(packed, torch.float32))
    np.testing.assert_allclose(packed.lse_N.array, seen.logsumexp(-1), atol=1e-4)
    true = head.logits(unpack_state(exact, torch.float32)).double().log_softmax(-1)
    kl = (true.exp() * (true - seen.double().log_softmax(-1))).sum(-1)
    assert 0 < kl.mean() < 2e-3
    assert packed.payload_bytes < 0.5 * exact.payload_bytes


def test_chunked_reductions_change_nothing(model_factory):
    folder = model_factory("qwen2")
    batch = TokenBatch.pack(sequences(lengths=(120, 100)))
    one = backend(folder)
    one._chunk_bytes = 0  # a row at a time
    (tiny,) = one.score([(batch, SignalSpec("top_k", 300, k=4))])
    (big,) = backend(folder).score([(batch, SignalSpec("top_k", 300, k=4))])
    np.testing.assert_array_equal(tiny.topk_ids_NK.array, big.topk_ids_NK.array)
    np.testing.assert_allclose(tiny.lse_N.array, big.lse_N.array, atol=1e-5)


def test_the_fingerprint_is_of_weights_configuration_and_dtype(model_factory, tmp_path):
    folder = model_factory("qwen2")
    same, wide = backend(folder).facts.fingerprint, backend(folder, "bfloat16").facts.fingerprint
    assert same == backend(folder).facts.fingerprint != wide
    assert backend(model_factory("qwen2", seed=1)).facts.fingerprint != same
    assert len(bytes.fromhex(same)) == hashlib.sha256().digest_size


def test_a_teacher_may_keep_its_head(model_factory):
    from teacher_wire.errors import CapabilityError

    teacher = backend(model_factory("qwen2"), serve_head=False)
    assert teacher.facts.transports == ("top_k", "full") and teacher.facts.head_sha256 == ""
    with pytest.raises(CapabilityError):
        teacher.head()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded|tokenizer"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), "nonesuch"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "cannot be loaded"),
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
