"""The Triton kernels on a machine without a GPU: they compile for one, and Triton's interpreter finds what the plain paths find.

The tests of each kernel (`test_fused.py`, `test_fused_joined.py`) run on a GPU, or with TRITON_INTERPRET=1; here a few of them do so in a
process of their own, all in `make thorough`.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

FEW = (
    "test_top_k and forward_kl and 0.3 or test_teachers_of_one_tokenizer and jsd"
    " or test_chunks_of_several_rows and 3 or test_rows_of_a_teacher or test_a_wrong_row or test_figures_of_rows or test_the_worst_row or test_an_empty_class or test_a_logit_that or rounded or test_policy"
)


@pytest.mark.parametrize("which", [FEW, pytest.param("test", marks=pytest.mark.thorough)], ids=["some", "all"])
def test_in_the_interpreter(which):
    files = [os.path.join(os.path.dirname(__file__), name) for name in ("test_fused.py", "test_fused_joined.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, *files],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1]


def kernels():
    """Each with the types of its arguments and its constants, in the shapes of a vocabulary of 152 thousand ids."""
    from student_trainer.losses import fused
    from student_trainer.losses.cross_tokenizer import kernels as classes
    from student_trainer.losses.cross_tokenizer import transposed as across
    from student_trainer.losses.output.joined import kernels as joined

    f, i, n, number = "*fp32", "*i32", "*i64", "fp32"
    vocab, step = {"VOCAB": 151_936}, "i32"
    sizes = {"ROWS": classes.ROWS, "BLOCK": classes.BLOCK, "TILE": classes.TILE, "SEVERAL": classes.SEVERAL}
    flags = {"HARD": True, "PRIOR": True, "SPREAD": True, "PLACED": True, "BLOCK": joined.BLOCK}
    block = {"BLOCK": fused.BLOCK}
    yield fused._row_best, [f, n, f, f, n, step], {**vocab, "ALL": True, **block}, 8
    yield fused._row_figures, [f, n, f, f, f, n, number, step], {**vocab, "GIVEN": False, **block}, 8
    yield fused._worst_row, [n, f, f, f, f, "*fp64", *[number] * 5, "i32"], {"SKIPS": True, "BLOCK": 1024}, 4
    yield fused._softmax_grad, [f, f, f, n, f, "*bf16", step, step], {**vocab, **block}, 8
    yield (
        fused._divergence_grad,
        [f] * 6 + [n, f, f, "*bf16"] + [number] * 3 + [step] * 3,
        {**vocab, "KIND": 2, "SFT": True, **block},
        8,
    )
    yield classes._safe, [f, f, n, f, "*i1", f, step, step, "i32"], {"BLOCK": classes.SEVERAL}, 1
    yield classes._sum, [f, n, i, i, i, i, f, step, step, number, *["i32"] * 5], {"CHOSEN": True, **sizes}, 4
    lines = {"IDS": across.IDS, "ROWS": across.ROWS}
    numbers = [step, *["i32"] * 3]
    yield across._part_of_figures, [f, n, f, f, i, number, *numbers], {"KIND": 1, **lines}, 4
    yield across._part_of_figures, [f, n, f, f, i, number, *numbers], {"KIND": 2, **lines}, 4
    yield across._whole_figures, [f, n, f, f, i, f, f, n, step, "i32", "i32"], {"KIND": 2, "ROWS": across.ROWS}, 2
    yield across._sum, [f, i, i, i, i, f, step, step, number, *["i32"] * 3], {"SOME": across.SOME, **lines}, 4
    compared = [*[f] * 8, *[number] * 3, step, step, *["i32"] * 3]
    yield across._divergence, compared, {"KIND": 2, "SLOPES": True, **lines}, 4
    yield across._divergence, compared, {"KIND": 0, "SLOPES": False, **lines}, 4
    hard = {"HARD": True, "PRIOR": True, "SPREAD": True}
    yield across._gradient, [f, f, f, n, f, f, f, i, "*bf16", number, step, "i32"], {**hard, **lines}, 4
    yield joined._gradient, [f, f, f, n, f, f, f, i, n, "*bf16", number, *[step] * 5], {**vocab, **flags}, 8
    yield joined._group_slopes, [f, f, n, n, n, f, "*fp64", f, "i32", "i32", number, number], {}, 1


def test_they_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, types, constants, warps in kernels():
        free = [name for name in kernel.arg_names if name not in constants]
        signature = dict(zip(free, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        ordered = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, ordered, constexprs=places)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert made.asm["cubin"], kernel.__name__
