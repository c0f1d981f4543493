"""The Triton kernels of signals of layers against their plain versions: on a GPU, or by Triton's interpreter, which needs none.

The interpreter is chosen when triton is imported (TRITON_INTERPRET=1): without a GPU one test runs the others in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from teacher_server.backends.transformers.capture import activation, sorting_kernel
from teacher_server.signals.features import attention, pooling_kernel
from tests.teacher_server.signals.test_features import by_definition, random_inputs

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 (3.9): there float16 stands for both.
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the others run by themselves")
@pytest.mark.timeout(900)  # some 40 s on a quiet machine
def test_kernels_by_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def on_device(captured, inputs, dtype):
    """Queries and keys in `dtype` where kernels run, and the same numbers in float32 for the definition."""
    query, key = inputs.query_RHd.to(dtype), inputs.key_TGd.to(dtype)
    more = {name: getattr(inputs, name) for name in ("scale", "softcap", "window")}
    plain = type(inputs)(query.float(), key.float(), key, key, **more)
    query, key = query.to(DEVICE), key.to(DEVICE)
    return type(inputs)(query, key, key, key, **more), plain


LENGTHS = (5, 200, 1, 64, 65, 130)
ROWS_OF = [
    np.arange(5),
    np.array([0, 3, 63, 64, 65, 127, 128, 199]),
    np.arange(0),
    np.arange(64),
    np.array([64]),
    np.arange(60, 130),
]


CAPPED = {"softcap": 2.0, "window": 70}
CASES = [(6, 2, 32, more) for more in ({}, CAPPED, {"window": 1})]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "channels", "more"), [*CASES, (4, 4, 20, CAPPED), (3, 1, 64, {})], ids=str)
def test_pooled_maps_are_the_definitions(dtype, more, heads, groups, channels):
    captured, given = random_inputs(LENGTHS, ROWS_OF, heads, groups, channels, **more)
    inputs, plain = on_device(captured, given, dtype)
    found = pooling_kernel.pooled(captured, inputs).cpu()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), by_definition(captured, plain), rtol=2**-10, atol=2e-6)
    torch.testing.assert_close(found, attention.pooled(captured, plain), rtol=2**-9, atol=2e-6)


@runs
def test_pooled_maps_have_the_same_bits_in_any_company():
    """A row alone, beside others of its sequence, and with other sequences before it."""
    captured, given = random_inputs((150, 131), [np.arange(150), np.arange(131)], 4, 2, 32, window=90)
    inputs, _ = on_device(captured, given, torch.float16)
    whole = pooling_kernel.pooled(captured, inputs).cpu()
    counts_R = captured.position_R // 64 + 1
    for rows, sequence in ((np.array([149]), 0), (np.array([3, 64, 130]), 1), (np.arange(40, 120), 1)):
        places = np.flatnonzero(captured.sequence_R == sequence)[rows]
        start, stop = captured.cu_tokens_B1[sequence], captured.cu_tokens_B1[sequence + 1]
        key = inputs.key_TGd[start:stop]
        alone = type(inputs)(inputs.query_RHd[places], key, key, key, inputs.scale, window=90)
        part = type(captured)(
            cu_tokens_B1=np.array([0, stop - start]), position_R=rows, sequence_R=np.zeros(len(rows), np.int64)
        )
        expected = torch.cat([whole[sum(counts_R[:at]) : sum(counts_R[: at + 1])] for at in places])
        assert torch.equal(pooling_kernel.pooled(part, alone).cpu(), expected)


@runs
def test_no_rows_have_no_entries():
    captured, given = random_inputs((5, 3), [np.arange(0), np.arange(0)], 4, 2, 32)
    inputs, _ = on_device(captured, given, torch.float16)
    assert pooling_kernel.pooled(captured, inputs).shape == (0,)


@runs
def test_keys_and_queries_may_be_slices_of_wider_rows():
    captured, given = random_inputs((70, 9), [np.arange(70), np.array([2, 8])], 4, 2, 32)
    inputs, plain = on_device(captured, given, torch.float16)
    wide = lambda x: torch.cat([x, x.new_full(x.shape, torch.nan)], 1)[:, : x.shape[1]]  # noqa: E731
    sliced = type(inputs)(wide(inputs.query_RHd), wide(inputs.key_TGd), inputs.key_TGd, inputs.key_TGd, inputs.scale)
    found = pooling_kernel.pooled(captured, sliced).cpu().double()
    torch.testing.assert_close(found, by_definition(captured, plain), rtol=2**-10, atol=2e-6)


def rows_of(width, dtype):
    """Of every kind that a row can be: of products of normal numbers, with ties, with zeros, one number, none but one, far apart."""
    generator = torch.Generator().manual_seed(0)
    u_RF = torch.randn(12, width, generator=generator) * torch.randn(12, width, generator=generator)
    u_RF[1] = u_RF[1].round()
    u_RF[2] = u_RF[2].relu()
    u_RF[3] = -0.375
    u_RF[4] = 0.0
    u_RF[5] = 0.0
    u_RF[5, width // 2] = 3.0
    u_RF[6, ::2] *= 2.0**-12
    u_RF[7] *= 2.0**-20  # subnormal in float16
    u_RF[8, 0] = 3e4
    return u_RF.to(dtype)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [9, 2100])
def test_means_of_sorted_parts_are_those_of_a_sort(dtype, width, monkeypatch):
    monkeypatch.setattr(sorting_kernel, "_PROGRAMS", 5)  # a program has several rows, and its counts must be 0 again
    if INTERPRETED:
        monkeypatch.setattr(sorting_kernel, "_BINS", 2048)  # its steps cost the same whatever their width
    u_RF = rows_of(width, dtype)
    found = sorting_kernel.sorted_means(u_RF.to(DEVICE), 16).cpu()
    size_RF = u_RF.double().abs().sort(-1, descending=True).values
    bounds = [(i * width // 16, max((i + 1) * width // 16, i * width // 16 + 1)) for i in range(16)]
    means_RQ = torch.stack([size_RF[:, start:stop].mean(-1) for start, stop in bounds], -1)
    expected = means_RQ / size_RF.sum(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(found, activation.sorted_means(u_RF), rtol=2e-5, atol=1e-9)


@runs
def test_rows_that_are_no_numbers_stay_apart(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(sorting_kernel, "_BINS", 2048)
    u_RF = rows_of(300, torch.bfloat16)
    u_RF[0, 7] = torch.nan
    u_RF[1, 3] = torch.inf
    found, plain = sorting_kernel.sorted_means(u_RF.to(DEVICE), 16).cpu(), activation.sorted_means(u_RF)
    torch.testing.assert_close(found, plain, rtol=2e-5, atol=1e-9, equal_nan=True)
    assert found[0].isnan().all() and found[2:].isfinite().all()
