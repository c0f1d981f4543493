"""Compiled layers against the plain ones, in values and gradients; and what makes passes fit for recording."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import clear_caches
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.load import Student, load_student, quicken
from student_trainer.model.speed import compiled
from tests.thorough import thorough

FAMILIES = ["qwen2", "llama", "gemma2", "glm4", "cohere", "granite"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def student_of(folder, *, checkpointing: bool = True, lora: dict[str, Any] | None = None) -> Student:
    settings = LoraSettings(**(lora or {"rank": 4}))
    config = ModelConfig(path=str(folder), dtype="float32", lora=settings, gradient_checkpointing=checkpointing)
    student = load_student(config, 0)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:  # zero at first: then nothing would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    student.model.train()
    return student


def step(student: Student, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids_BL = torch.arange(3, 3 + 2 * length).remainder(290).reshape(2, length)
    state_BLD = student.states(ids_BL)
    (state_BLD * torch.linspace(-1, 1, state_BLD.numel()).view_as(state_BLD)).sum().backward()
    grads = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad(set_to_none=True)
    return state_BLD.detach(), grads


def same(one: Student, other: Student, length: int) -> None:
    (states, grads), (expected, expected_grads) = step(one, length), step(other, length)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        ("qwen2", False),
        ("gemma2", True),
        *(thorough(family, True) for family in FAMILIES if family != "gemma2"),
    ],
)
def test_the_same_values_and_gradients_for_every_length(model_factory, family, checkpointing):
    plain = student_of(model_factory(family), checkpointing=checkpointing)
    quick = copy.deepcopy(plain)
    assert compiled.install(quick.model, "aot_eager") == 2
    for length in (9, 14, 70, 9):
        same(quick, plain, length)
    assert quick.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("family", ["qwen2", thorough("llama")])
def test_one_graph_serves_all_layers_and_all_lengths_whatever_came_before(model_factory, family):
    """A resumed run begins at another length, and must go on by the same kernels."""
    student = student_of(model_factory(family))
    compiled.install(student.model, "aot_eager")
    for length in (9, 14, 33, 70, 9, 21):
        step(student, length)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["stats"]["calls_captured"] == 2, (
        "the layer and its checkpoint, once: no second compilation for a scaling"
    )


def test_measuring_is_left_alone_and_all_can_be_taken_back(model_factory):
    plain = student_of(model_factory("qwen2"))
    quick = copy.deepcopy(plain)
    compiled.install(quick.model, "aot_eager")
    ids_BL = torch.arange(24).reshape(2, 12)
    for one in (plain, quick):
        one.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(quick.states(ids_BL), plain.states(ids_BL), rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 0
    compiled.uninstall(quick.model)
    assert [type(m) for m in quick.model.modules()] == [type(m) for m in plain.model.modules()]


@pytest.mark.parametrize("kept", [True, thorough(False)])
def test_nothing_random_is_computed_twice(model_factory, monkeypatch, kept):
    """A recording cannot hold the generator's state; torch saves it for attention, which might draw, if it is computed again."""
    names: dict[str, list[str]] = {"forward": [], "backward": []}

    def keep(into: str) -> Any:
        def compile_graph(graph: Any, _: Any) -> Any:
            names[into] += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph)

        return compile_graph

    if not kept:  # the test can fail
        monkeypatch.setattr(compiled, "_policy", lambda *_, **__: compiled.CheckpointPolicy.PREFER_RECOMPUTE)
    backend = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    student = student_of(model_factory("qwen2"))
    compiled.install(student.model, backend)
    step(student, 12)
    random = [name for name in names["forward"] + names["backward"] if "rng_state" in name]
    assert (not random) == kept
    if kept:
        backward = names["backward"]
        assert any("attention" in name and "backward" in name for name in backward)
        assert not any("attention" in name and "backward" not in name for name in backward)
        plain_products = sum(".mm" in name or "addmm" in name for name in names["forward"])
        assert plain_products == 21, "seven layers and two products of each adapter"


def test_layers_that_do_not_compile_are_run_as_they_are_unless_they_must(model_factory, caplog):
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise OSError("no C compiler found")

    plain = student_of(model_factory("qwen2"))
    quick, strict = copy.deepcopy(plain), copy.deepcopy(plain)
    compiled.install(quick.model, no_compiler, required=False)
    for length in (9, 14):
        same(quick, plain, length)
    told = [record.getMessage() for record in caplog.records if record.name == compiled.__name__]
    assert len(told) == 1 and "no C compiler found" in told[0]
    compiled.install(strict.model, no_compiler)
    with pytest.raises(ModelError, match=r"model\.compiled=true: .*no C compiler found.*set it to auto or false"):
        step(strict, 9)


def test_layers_whose_way_back_does_not_compile_are_run_as_they_are(model_factory, caplog):
    def fails(graph: Any, inputs: Any) -> Any:
        raise OSError("ptxas is missing")

    plain = student_of(model_factory("qwen2"))
    quick = copy.deepcopy(plain)
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=fails)
    compiled.install(quick.model, backend, required=False)
    for length in (9, 14):
        same(quick, plain, length)
    assert "ptxas is missing" in caplog.text


@torch._dynamo.config.patch(recompile_limit=1)
def test_layers_that_the_compiler_gives_up_later_are_told_of(model_factory, caplog):
    """torch goes on without a word once it has met too many kinds of calls."""
    plain = student_of(model_factory("qwen2"))
    quick, strict = copy.deepcopy(plain), copy.deepcopy(plain)
    compiled.install(quick.model, "aot_eager", required=False)
    same(quick, plain, 9)
    assert counters["stats"]["unique_graphs"] == 1
    assert not [record for record in caplog.records if record.name == compiled.__name__]
    for student in (quick, plain):
        student.model.double()
    for length in (9, 14):
        same(quick, plain, length)
    told = [record.getMessage() for record in caplog.records if record.name == compiled.__name__]
    assert len(told) == 1 and "more kinds of calls" in told[0]
    torch._dynamo.reset()
    compiled.install(strict.model, "aot_eager")
    step(strict, 9)
    strict.model.double()
    with pytest.raises(ModelError, match=r"model\.compiled=true: .*more kinds of calls.*set it to auto or false"):
        step(strict, 9)


@torch._dynamo.config.patch(recompile_limit=1)
def test_many_students_of_one_process_share_a_graph(model_factory, caplog):
    """torch keeps eight graphs of a function: the ninth training would not be compiled."""
    for number in range(3):
        student = student_of(model_factory("qwen2"))
        compiled.install(student.model, "aot_eager", required=number == 2)
        step(student, 9 + number)
    assert counters["stats"]["unique_graphs"] == 1
    assert not [record for record in caplog.records if record.name == compiled.__name__]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_real_compiler(model_factory):
    plain = student_of(model_factory("qwen2"))
    quick = copy.deepcopy(plain)
    compiled.install(quick.model)
    same(quick, plain, 12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_loops_kept_on_disk_for_vectors_of_another_width_are_not_taken(monkeypatch, tmp_path):
    """torch's own key does not hold the width; compiled for wider vectors, the kept loops write beyond their tensors."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("needs a processor with vectors of two widths")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for capability, width in (("avx2", 256), ("avx512", 512)):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        options = compiled._vector_width()
        assert options == {"cpp.simdlen": width}
        torch._dynamo.reset()
        clear_caches()
        torch.compile(lambda x: x * 2 + 1, options=options)(torch.ones(3, 32))
    assert (counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]) == (2, 0)


def test_layers_on_a_cpu_are_compiled_with_the_width_said(model_factory, monkeypatch):
    said = []
    monkeypatch.setattr(torch, "compile", lambda run, **settings: said.append(settings["options"]) or run)
    for backend in ("inductor", "aot_eager"):
        compiled.install(student_of(model_factory("qwen2")).model, backend)
    assert said == [compiled._vector_width(), None]


def test_which_students_are_compiled_and_recorded(model_factory, monkeypatch):
    folder = str(model_factory("qwen2"))

    def found(**settings: Any) -> tuple[bool, bool]:
        model = student_of(model_factory("qwen2"), lora=settings.pop("lora", None)).model
        compiled.uninstall(model)  # loaded as on a GPU, it is compiled already
        is_graphed = quicken(model, ModelConfig(path=folder, **settings))
        return is_graphed, any(isinstance(module, compiled._Compiled) for module in model.modules())

    assert found() == (False, False), "on a CPU neither"
    assert found(compiled=True) == (False, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = {"lora": {"rank": 4, "dropout": 0.1}}
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *_: self)
    assert found() == found(graphs=True) == (True, True), "on a GPU both"
    assert found(graphs=False) == (False, True)
    assert found(compiled=False) == (False, False)
    assert found(**config) == (False, True), "what draws random numbers cannot be recorded"
    head_alone = {"lora": {"rank": 4, "target_modules": ["lm_head"]}}
    assert found(**head_alone) == (False, True), "nothing to record"
    with pytest.raises(ModelError, match=r"model\.graphs=true has nothing to record"):
        found(graphs=True, **head_alone)
    for refused, said in (({"compiled": False}, "model.compiled=false gave none"), (config, r"lora_dropout.*p=0\.1")):
        with pytest.raises(ModelError, match=said):
            found(graphs=True, **refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.graphs=true needs a GPU"):
        found(graphs=True)
    with pytest.raises(ModelError, match=r"model\.compiled=true: Linear"):
        quicken(torch.nn.Linear(2, 2), ModelConfig(path=folder, compiled=True))


@pytest.mark.parametrize("family", [*FAMILIES, "internlm3", "glm"])
def test_right_padded_sequences_need_no_mask(model_factory, family):
    """Sliding windows, soft caps and all: a token sees nothing of what stands behind it."""
    student = student_of(model_factory(family))
    student.model.eval()
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(3, 300, (3, 100), generator=generator)
    lengths = (100, 80, 7)
    mask_BL = torch.zeros_like(ids_BL)
    for b, length in enumerate(lengths):
        mask_BL[b, :length] = 1
        ids_BL[b, length:] = 0
    body = student.causal_lm.get_decoder()
    with torch.no_grad():
        masked_BLD = body(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        state_BLD = student.states(ids_BL)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(state_BLD[b, :length], masked_BLD[b, :length], rtol=1e-4, atol=2e-4)


def test_dropout_is_computed_again_and_by_the_same_numbers(model_factory):
    """Kept, its outputs would take what checkpointing saves."""
    policies = {
        op: compiled._policy(None, op) for op in (torch.ops.aten.native_dropout.default, torch.ops.aten.mm.default)
    }
    assert set(policies.values()) == {compiled.CheckpointPolicy.PREFER_RECOMPUTE}
    plain = student_of(model_factory("qwen2"), lora={"rank": 4, "dropout": 0.3})
    quick = copy.deepcopy(plain)
    compiled.install(quick.model, "aot_eager")
    found = []
    for one in (plain, quick):
        torch.manual_seed(7)
        found.append(step(one, 12))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    torch.manual_seed(8)
    assert not torch.allclose(step(quick, 12)[0], found[1][0], atol=1e-2), "it draws"


class _Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_reads_nothing_back(model_factory, family):
    student = student_of(model_factory(family))
    ids_BL = torch.arange(24).reshape(2, 12)
    with _Reads() as reads:
        student.states(ids_BL)
    assert not reads.found
    with _Reads() as reads:  # the test can fail: transformers looks for packed sequences
        student.causal_lm.get_decoder()(input_ids=ids_BL, use_cache=False)
    assert reads.found


def test_nothing_is_compiled_anew_while_a_stream_is_recorded(model_factory, monkeypatch):
    """transformers makes another mask then, which would be another graph, and compiling cannot be recorded."""
    student = student_of(model_factory("qwen2"))
    compiled.install(student.model, "aot_eager")
    for length in (9, 14):
        step(student, length)
    before = counters["stats"]["unique_graphs"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for length in (9, 14, 20):
        step(student, length)
    assert counters["stats"]["unique_graphs"] == before
