"""Top-k and log-sums by kernels against float64: on a GPU, or with TRITON_INTERPRET=1, as a process of its own does here for some; and they compile without one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from teacher_server.signals import kernels, output

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("padding", [0, 61], ids=["side by side", "rows apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "k"), [(300, 64), (5003, 1), (9999, 64), (151_665, 64), (152_064, 128)])
def test_top_k_and_log_sums(monkeypatch, dtype, vocab, k, padding):
    """Ids exactly, ties and zeros of both signs included; log-sums within rounding of float64's."""
    monkeypatch.setattr(
        kernels, "usable", lambda z_CV, k=0: z_CV.element_size() == 2 and k <= kernels.MAX_K
    )  # wherever it is
    torch.manual_seed(0)
    whole = (torch.randn(8, vocab + padding) * 3).to(DEVICE, dtype)
    z = whole[:, :vocab]
    z[0] = z[0].round()
    z[1], z[1, ::3] = 0.0, -0.0
    z[2, : vocab // 2] = -torch.inf
    ids, lse, rest = kernels.top_k(z, k)
    wide = z.double().cpu()
    order = np.lexsort((np.broadcast_to(np.arange(vocab), wide.shape), -wide.numpy()), axis=-1)
    np.testing.assert_array_equal(ids.cpu().numpy(), np.sort(order[:, :k], axis=-1))
    expected = wide.scatter(-1, ids.long().cpu(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double().cpu(), wide.logsumexp(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(kernels.lse(z).double().cpu(), wide.logsumexp(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(rest.double().cpu(), expected, atol=1e-5, rtol=1e-6)
    assert torch.equal(output.top_k(z, k)[1], z.topk(k, dim=-1).values)


@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter")
@pytest.mark.parametrize("which", ["5003", pytest.param("test_top_k", marks=pytest.mark.thorough)], ids=["some", "all"])
def test_in_the_interpreter(which):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1]


@pytest.mark.skipif(INTERPRETED, reason="compiled, not interpreted")
def test_they_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    z, f, i = "*bf16", "*fp32", "*i32"
    blocks = {"BLOCK": kernels.BLOCK, "BLOCKS": kernels._TILE_BLOCKS}
    for kernel, types, constants in (
        (kernels._block_figures, [z, f, f, *["i32"] * 3], blocks),
        (kernels._select, [z, f, f, i, i, f, f, *["i32"] * 5], {"BLOCK": kernels.BLOCK, "BLOCKS": 4096, "PLACES": 64}),
    ):
        free = [name for name in kernel.arg_names if name not in constants]
        signature = dict(zip(free, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=places)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert made.asm["cubin"], kernel.__name__
