"""Real vLLM as the student's writer: it writes with the weights it was given, tells their log-probabilities, and survives a death."""

import importlib.util
import os
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.errors import RolloutError
from student_trainer.model.load import load_student
from student_trainer.rollout.engines import registry, vllm_engine
from student_trainer.rollout.engines.hf_sampler import Sampling
from student_trainer.rollout.engines.vllm_engine import VllmSampler
from student_trainer.rollout.engines.vllm_room import device_of, usual_batch
from student_trainer.rollout.sample import Rollout, RolloutFailure, RolloutPrompt

V = 290  # of the student's 300: the others must neither be drawn nor count


def student_of(folder, **settings):
    return load_student(ModelConfig(path=str(folder), dtype="float32", **settings), seed=0)


def shaken(student, seed):
    """Trained weights as after some steps, and they are the student's."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return trained


def prompts_of(*lengths):
    rng = np.random.default_rng(1)
    return [
        RolloutPrompt(2, slot, rng.integers(3, V, n).astype(np.int32), f"row {slot}") for slot, n in enumerate(lengths)
    ]


@torch.no_grad()
def own_logp(student, rollout, temperature):
    student.model.eval()
    start = rollout.prompt.token_ids.size
    ids = np.concatenate([rollout.prompt.token_ids, rollout.token_ids])
    z_nV = student.model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, start - 1 : -1, :V].float()
    logp_nV = torch.log_softmax(z_nV / temperature, -1)
    return logp_nV.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0].numpy(), z_nV


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and "LYCEUM_VLLM" not in os.environ, reason="no vLLM: make setup-vllm"
)
def test_it_writes_with_the_weights_it_was_given(model_factory):
    student = student_of(model_factory("qwen2", hidden=128), lora={"rank": 4})
    sampling = Sampling(7, 12, temperature=0.8, stop_ids=frozenset(range(40, 60)), likeliest=3, batch=4)
    sampler = VllmSampler(student, sampling, V, longest=64)
    process = psutil.Process(sampler._process.pid)
    try:
        weights = shaken(student, 1)
        sampler.load(weights, 5)
        prompts = prompts_of(5, 17, 2, 40, 5, 60, 0)
        prompts.append(RolloutPrompt(2, 9, np.array([3, 295], np.int32), "row 9"))
        *written, long, empty, foreign = sampler.sample(prompts)
        for prompt, rollout in zip(prompts, written, strict=False):
            assert isinstance(rollout, Rollout) and rollout.prompt is prompt and rollout.version == 5
            assert rollout.token_ids.max() < V and rollout.token_ids.size <= 12
            stops = np.isin(rollout.token_ids, sorted(sampling.stop_ids))
            assert not stops[:-1].any() and stops[-1] == rollout.finished and (rollout.finished or len(stops) == 12)
            logp_n, z_nV = own_logp(student, rollout, 0.8)
            np.testing.assert_allclose(rollout.logp_n, logp_n, atol=1e-3)
            top_nM = z_nV.topk(3).values.numpy()
            told_nM = z_nV.gather(-1, torch.from_numpy(rollout.likeliest_nM).long()).numpy()
            np.testing.assert_allclose(told_nM, top_nM, atol=1e-3)
        assert {rollout.finished for rollout in written} == {True, False}
        for failure, word in ((long, "64"), (empty, "empty"), (foreign, "295")):
            assert isinstance(failure, RolloutFailure) and word in failure.why
        again = sampler.sample(prompts[1:3])  # in other company
        assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in written[1:3]]
        assert sampler._file is not None
        sampler._file.update(shaken(student, 2))  # the engine has copies: it knows nothing of these before it is told
        again = sampler.sample(prompts[1:3])
        assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in written[1:3]]
        sampler.load({name: p for name, p in student.model.named_parameters() if p.requires_grad}, 6)
        (third,) = sampler.sample(prompts[1:2])
        assert third.version == 6 and third.token_ids.tolist() != written[1].token_ids.tolist()
        np.testing.assert_allclose(third.logp_n, own_logp(student, third, 0.8)[0], atol=1e-3)
    finally:
        sampler.close()
        sampler.close()
    assert not process.is_running() and not sampler._folder.exists()


@pytest.mark.parametrize(
    ("gib", "dtype", "expected"),
    [(1, None, 32), (24, None, 60), (24, torch.bfloat16, 120), (141, None, 256), (141, torch.bfloat16, 256)],
)
def test_a_gpu_keeps_a_sixteenth_of_its_memory_for_sequences(model_factory, monkeypatch, gib, dtype, expected):
    """Two layers of two heads of 8, keys and values, float32: 256 bytes a token, in pages of 16 tokens."""
    student = student_of(model_factory("llama"))
    config = student.causal_lm.config
    assert (config.num_hidden_layers, config.num_key_value_heads * config.head_dim) == (2, 16)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=gib << 30)
    )
    longest = (24 << 30) // 16 // 60 // 256 // 16 * 16 - 3  # just 60 of these in 24 GiB
    assert usual_batch(student, dtype, longest, torch.device("cuda", 1)) == expected


def test_a_gpu_that_is_not_there_is_named(model_factory, monkeypatch):
    student = student_of(model_factory("qwen2"))
    assert device_of(student, None) == student.outline.device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(student, 1) == torch.device("cuda", 1)
    with pytest.raises(RolloutError, match=r"on_policy\.device=2: this process sees 2 GPUs, 0 to 1"):
        device_of(student, 2)


@pytest.mark.parametrize(
    ("section", "windows", "batch", "device"),
    [
        ({}, (4, 3), 12, None),
        ({}, (64, 8), 60, None),
        ({"batch": 7}, (64, 8), 7, None),
        ({"batch": 700, "device": 1}, (4, 3), 700, 1),
    ],
)
def test_a_run_says_how_many_at_a_time_and_where(model_factory, tmp_path, monkeypatch, section, windows, batch, device):
    """A GPU holds 60 here; what is written down is taken as it is."""
    student = student_of(model_factory("qwen2"))
    seen = {}
    monkeypatch.setattr(registry, "VllmSampler", lambda *_, **named: seen.update(sampling=_[1], **named))
    monkeypatch.setattr(registry, "usual_batch", lambda student, narrowed, longest, device: 60)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tree = {
        "run": {"output_dir": str(tmp_path / "run")}, "model": {"path": "here"}, "data": {"train": ["rows.jsonl"], "max_tokens": 50},
        "teacher": {"address": "127.0.0.1:1"}, "on_policy": {"engine": "vllm", "max_new_tokens": 9} | section,
        "train": {"batch_size": windows[0], "accumulation": windows[1]},
    }  # fmt: skip
    config = parse_config(tree, "test")
    registry.build_sampler(config, config.on_policy, student, vocab_rows=V, stop_ids=frozenset())
    assert seen["sampling"].batch == batch and seen["longest"] == 59
    assert seen["device"] == (student.outline.device if device is None else torch.device("cuda", device))


@pytest.mark.parametrize(("seen", "wanted"), [(None, "1"), ("3,5", "5"), ("GPU-aa,GPU-bb", "GPU-bb")])
def test_its_process_sees_the_gpu_it_writes_on(model_factory, monkeypatch, seen, wanted):
    sampler = VllmSampler.__new__(VllmSampler)
    sampler._device, sampler._threads = torch.device("cuda", 1), 1
    monkeypatch.setattr(os, "environ", {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})
    assert sampler._environment()["CUDA_VISIBLE_DEVICES"] == wanted


def test_a_closed_one_leaves_no_memory(model_factory, tmp_path, monkeypatch):
    """Its file of weights is in memory, and stays there for as long as anybody has it mapped."""
    stub(
        tmp_path,
        monkeypatch,
        "print(json.dumps({'ready': True}), flush=True)\nfor _ in sys.stdin: print('{}', flush=True)",
    )
    monkeypatch.setattr(VllmSampler, "_probe", lambda self: None)
    sampler = VllmSampler(student_of(model_factory("qwen2"), lora={"rank": 4}), Sampling(0, 4), V, longest=32)
    name = sampler._folder.name
    assert name in Path("/proc/self/maps").read_text()
    sampler.close()
    assert name not in Path("/proc/self/maps").read_text() and not sampler._folder.exists()


def stub(tmp_path, monkeypatch, body):
    """In the place of the worker: answers as `body` says."""
    package = tmp_path / "stub_worker.py"
    package.write_text(f"import json, os, sys\nstart = json.loads(sys.stdin.readline())\n{body}\n")
    monkeypatch.setattr(vllm_engine, "_COMMAND", ("-m", "stub_worker"))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_process_that_does_not_start_is_told_of_with_its_log(model_factory, tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, "print('no room on this device', file=sys.stderr); sys.exit(3)")
    with pytest.raises(RolloutError, match=r"does not start: exit code 3.*no room on this device"):
        VllmSampler(student_of(model_factory("qwen2")), Sampling(0, 4), V, longest=32)


def test_an_error_of_the_engine_keeps_its_sentence_and_leaves_nothing(model_factory, tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, "print(json.dumps({'error': 'ValueError: no such model'}), flush=True)")
    before = set(psutil.Process().children())
    with pytest.raises(RolloutError, match="ValueError: no such model"):
        VllmSampler(student_of(model_factory("qwen2")), Sampling(0, 4), V, longest=32)
    assert set(psutil.Process().children()) <= before


def test_an_engine_that_takes_no_new_weights_is_told_of_before_step_0(model_factory, tmp_path, monkeypatch):
    """As vLLM 0.32 on a CPU with a mixture of experts: it loads its file, and breaks at the next one."""
    answer = "print(json.dumps({'error': 'RuntimeError: sizes differ'}), flush=True)"
    stub(tmp_path, monkeypatch, f"print(json.dumps({{'ready': True}}), flush=True)\nfor _ in sys.stdin: {answer}")
    with pytest.raises(RolloutError, match=r"sizes differ \(as it was given the weights of Qwen2ForCausalLM a second"):
        VllmSampler(student_of(model_factory("qwen2")), Sampling(0, 4), V, longest=32)


def test_a_process_that_dies_twice_ends_the_run(model_factory, tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, "print(json.dumps({'ready': True}), flush=True); sys.stdin.readline(); os._exit(9)")
    with pytest.raises(RolloutError, match="died twice: exit code 9"):
        VllmSampler(student_of(model_factory("qwen2")), Sampling(0, 4), V, longest=32)


def test_a_process_that_dies_once_is_started_again_with_the_weights_it_had(model_factory, tmp_path, monkeypatch):
    """The stub tells one token, whose id is the seed's and whose log-probability is a sum over the weights in its folder."""
    body = """
from pathlib import Path
from safetensors.torch import load_file
print(json.dumps({'ready': True}), flush=True)
folder = Path(start['model'])
for line in sys.stdin:
    request = json.loads(line)
    if request['do'] == 'load':
        (folder / 'die').touch()
    elif (folder / 'die').is_file():
        (folder / 'die').unlink()
        os._exit(9)
    total = -1e-3 * sum(float(w.double().abs().sum()) for w in load_file(folder / 'model.safetensors').values())
    samples = [{'ids': [seed % 100], 'logp': [total], 'finish': 'stop'} for seed in request.get('seeds', [])]
    print(json.dumps({'samples': samples}), flush=True)
"""
    stub(tmp_path, monkeypatch, body)
    monkeypatch.setattr(VllmSampler, "_probe", lambda self: None)
    student = student_of(model_factory("qwen2"))
    sampler = VllmSampler(student, Sampling(0, 4), V, longest=32)
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: pytest.fail("a training step beside it would see it"))
    try:
        (first,) = sampler.sample(prompts_of(4))
        sampler.load(shaken(student, 2), 3)
        (second,) = sampler.sample(prompts_of(4))
        (third,) = sampler.sample(prompts_of(4))
    finally:
        sampler.close()
    assert first.token_ids == second.token_ids == third.token_ids
    assert first.logp_n > second.logp_n == third.logp_n and (first.version, second.version) == (0, 3)


def test_the_worker_ends_with_its_input(tmp_path):
    """Also amid a request, here amid its start: whoever kills the trainer leaves no process that holds a GPU."""
    import subprocess
    import sys

    code = (
        "import student_trainer.rollout.engines.vllm_worker as w, time; w.Worker = lambda *_: time.sleep(600); w.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write('{"model": "", "arguments": {}}\n')
    process.stdin.flush()
    time.sleep(0.5)
    process.stdin.close()
    assert process.wait(timeout=60) == 0
