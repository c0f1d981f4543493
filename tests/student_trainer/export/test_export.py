"""An export answers as the trained student, or it is not done; nothing of a run but the model is in it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from student_trainer.cli.models.export import app
from student_trainer.errors import ConfigError, DataError, ModelError, RunError
from student_trainer.export import awq, parity, run
from student_trainer.export.gguf import SCRIPT
from student_trainer.export.parity import Tolerance
from student_trainer.export.prompts import Rows
from student_trainer.export.run import Export, export
from tests.student_trainer.export import tiny_converter_path
from tests.tiny import make_model

QUIET = Console(quiet=True)
SMALL = {"prompts": 3, "max_new_tokens": 6}


def adapter_of(base: Path, folder: Path, dtype=torch.float32) -> Path:
    """A trained adapter as a run writes it, with a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def run_of(base: Path, folder: Path, rows: Path, **model) -> Path:
    """A finished run with an adapter, as `train` leaves it."""
    adapter_of(base, folder / "final")
    settings = {"run": {"output_dir": str(folder)}, "model": {"path": str(base), "dtype": "float32", **model}, "data": {"train": [str(rows)]}, "loss": {"output": None, "sft_weight": 1.0}}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "run.json").write_text("{}")
    (folder / "result.json").write_text("{}")
    (folder / "final" / "projectors.safetensors").write_bytes(b"not for others")
    return folder


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_a_run_is_merged_and_answers_as_its_adapter(model_factory, tmp_path, rows_file, family):
    base = model_factory(family)
    source = run_of(base, tmp_path / "run", rows_file)
    made = export(Export(source, tmp_path / "out", **SMALL), QUIET)
    assert (
        made.parity.holds
        and made.parity.same_answers == 3
        and made.parity.agreement == 1
        and made.parity.max_logit_difference < 1e-2
    )
    assert made.serve == f"vllm serve {tmp_path / 'out'} --served-model-name out --max-model-len 128"
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    from peft import PeftModel

    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            found.eval()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits, atol=1e-2, rtol=1e-3
        )
        greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        assert torch.equal(found.generate(ids, **greedy), trained.generate(ids, **greedy))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "export.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["merged_adapter"] and record["parity"]["holds"] and record["asked_about"] == "the run's training rows"


def test_a_whole_model_is_copied_to_the_byte_and_narrowed_where_asked(model_factory, tmp_path):
    base = model_factory("qwen2")
    made = export(Export(base, tmp_path / "out", **SMALL), QUIET)
    assert made.parity.max_logit_difference == 0 and made.parity.mean_kl == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    made = export(Export(base, tmp_path / "half", dtype="bfloat16", tolerance=Tolerance(1.0, 0.5), **SMALL), QUIET)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
        and made.parity.mean_kl > 0
    )


def test_what_answers_otherwise_is_not_done(model_factory, tmp_path, monkeypatch):
    source = adapter_of(model_factory("qwen2"), tmp_path / "adapter")
    honest = run.write_merged

    def without_a_layer(trained, student, folder, dtype):
        for name, layer in student.causal_lm.named_modules():
            if name.endswith("layers.1.mlp.down_proj"):
                layer.lora_B["default"].weight.data.zero_()
        honest(trained, student, folder, dtype)

    monkeypatch.setattr(run, "write_merged", without_a_layer)
    with pytest.raises(
        RunError,
        match=r"does not answer as the trained student, so it is not done: greedy answers .* KL mean .* kept as .*out.failed",
    ):
        export(Export(source, tmp_path / "out", **SMALL), QUIET)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / "model.safetensors").is_file()
    assert not json.loads((tmp_path / "out.failed" / "export.json").read_text())["parity"]["holds"]
    assert not list(tmp_path.glob(".*unfinished"))


def test_the_figures_are_those_of_the_formula():
    class Given(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, logits_TV):
            super().__init__()
            self.logits_TV = logits_TV

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": self.logits_TV[None]})

    ours, theirs = (
        torch.tensor([[9.0, 9, 9], [2, 1, 0], [0, 3, 1], [9, 9, 9]]),
        torch.tensor([[0.0, 0, 0], [3, 2, 2], [1, 0, 0], [0, 0, 0]]),
    )
    answered = parity.Answered([[5, 6]], [[0, 1]], [ours[1:3]])
    found = parity.compare(Given(theirs), answered, Tolerance(1.0, 0.5), lambda done: None)
    p, q = torch.softmax(ours[1:3].double(), -1), torch.softmax(theirs[1:3].double(), -1)
    kl = (p * (p.log() - q.log())).sum(-1)
    assert (found.mean_kl, found.max_kl) == pytest.approx((float(kl.mean()), float(kl.max())))
    assert (found.agreement, found.same_answers, found.rows) == (0.5, 0, 2)
    assert found.max_logit_difference == pytest.approx(
        float(torch.tensor([0, 3, 1.0]).sub(torch.tensor([1.0, 0, 0])).sub(1.0).abs().max())
    )
    assert found.holds and not parity.Parity(**{**vars(found), "tolerance": Tolerance(1.0, 0.6)}).holds
    assert not parity.Parity(**{**vars(found), "mean_kl": float("nan")}).holds


def test_gguf_is_read_back_and_asked_and_ollama_gets_a_modelfile(model_factory, tmp_path, monkeypatch):
    source = adapter_of(model_factory("qwen2"), tmp_path / "adapter")
    asked = Export(source, tmp_path / "out", "ollama", converter=tiny_converter_path(), outtype="f32", **SMALL)
    made = export(asked, QUIET)
    assert made.parity.holds and made.parity.same_answers == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "Modelfile", "export.json"}
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert (
        text.startswith("FROM ./model.gguf\nTEMPLATE ")
        and 'PARAMETER stop "<|im_end|>"' in text
        and "num_ctx 128" in text
    )
    assert made.serve == f"ollama create out -f {tmp_path / 'out'}/Modelfile && ollama run out"
    monkeypatch.setenv("SPOIL", "1")
    with pytest.raises(RunError, match="does not answer"):
        export(Export(**{**vars(asked), "out": tmp_path / "spoilt", "format": "gguf"}), QUIET)
    monkeypatch.setenv("BREAK", "1")
    with pytest.raises(ModelError, match="ended with 1: NotImplementedError: Architecture 'X' not supported!"):
        export(Export(**{**vars(asked), "out": tmp_path / "broken"}), QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "spoilt.failed"]


def test_a_gguf_that_cannot_be_read_back_is_unproven(model_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHITECTURE", "hyperclovax")
    asked = {
        "source": model_factory("qwen2"),
        "format": "gguf",
        "converter": tiny_converter_path(),
        "outtype": "f32",
        **SMALL,
    }
    with pytest.raises(ModelError, match="cannot read a GGUF file of hyperclovax back"):
        export(Export(out=tmp_path / "out", **asked), QUIET)
    made = export(Export(out=tmp_path / "out", unproven=True, **asked), QUIET)
    assert made.parity is None and json.loads((tmp_path / "out" / "export.json").read_text())["parity"] is None


def test_the_converter_is_looked_for(tmp_path, monkeypatch):
    from student_trainer.export.gguf import find_converter

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ConfigError, match=r"not on PATH, and LLAMA_CPP is not set"):
        find_converter(None)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    with pytest.raises(ConfigError, match="does not hold it"):
        find_converter(None)
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / SCRIPT).touch()
    assert find_converter(None) == tmp_path / "llama.cpp" / SCRIPT == find_converter(tmp_path / "llama.cpp")
    script = tmp_path / SCRIPT
    script.touch()
    script.chmod(0o755)
    assert find_converter(None) == script
    with pytest.raises(ConfigError, match="--converter nowhere: no such file"):
        find_converter(Path("nowhere"))


def test_rows_and_prompts_of_a_stranger(model_factory, tmp_path, rows_file):
    base = model_factory("qwen2")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat", "an old dog " * 40, "run by"))
    )
    made = export(Export(base, tmp_path / "a", rows=str(questions), **SMALL), QUIET)
    assert made.parity.prompts == 2 and made.notes == ("prompts that are empty or above 122 tokens, not asked: 1",)
    made = export(Export(base, tmp_path / "b", rows=f"{rows_file}#2", **SMALL), QUIET)
    assert made.parity.prompts == 2
    with pytest.raises(DataError, match="no such file"):
        export(Export(base, tmp_path / "c", rows="nowhere.jsonl", **SMALL), QUIET)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"source": Path("/nowhere")}, RunError, "no such folder"),
        ({"dtype": "int8"}, ConfigError, "--dtype int8: choose"),
        ({"format": "gguf", "outtype": "q4_k_m"}, ConfigError, "llama-quantize"),
        ({"unproven": True}, ConfigError, "not of merged"),
        ({"outtype": "f16"}, ConfigError, "not of merged"),
    ],
)
def test_what_is_refused(model_factory, tmp_path, monkeypatch, asked, error, words):
    monkeypatch.setenv("LLAMA_CPP", str(tiny_converter_path().parent))
    converter = {"converter": tiny_converter_path()} if asked.get("format") == "gguf" else {}
    with pytest.raises(error, match=words):
        export(Export(**{"source": model_factory("qwen2"), "out": tmp_path / "out", **converter, **asked}), QUIET)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(model_factory, tmp_path, rows_file):
    base = model_factory("qwen2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is neither a run"):
        export(Export(tmp_path / "empty", tmp_path / "out"), QUIET)
    source = run_of(base, tmp_path / "run", rows_file)
    (source / "result.json").unlink()
    with pytest.raises(RunError, match=r"no result yet: end it with student-trainer train .*config.yaml --resume"):
        export(Export(source, tmp_path / "out"), QUIET)
    with pytest.raises(RunError, match="exists already"):
        export(Export(base, source), QUIET)


def test_awq_without_llm_compressor_is_one_line(model_factory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    monkeypatch.setattr(awq.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"llmcompressor is not installed here: pip install 'lyceum-distill\[export\]'"
    ):
        export(Export(model_factory("qwen2"), tmp_path / "out", "awq"), QUIET)
    monkeypatch.setattr(awq.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ModelError, match="quantises on a GPU, and this machine has none"):
        export(Export(model_factory("qwen2"), tmp_path / "out", "awq"), QUIET)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(DataError, match="calibrated on rows"):
        export(Export(model_factory("qwen2"), tmp_path / "out", "awq"), QUIET)


def test_the_command(model_factory, tmp_path):
    made = CliRunner().invoke(
        app, [str(model_factory("qwen2")), str(tmp_path / "out"), "--prompts", "2", "--max-new-tokens", "4"]
    )
    assert made.exit_code == 0, made.output
    assert (
        "greedy answers the same on 2 of 2 prompts" in made.output
        and f"vllm serve {tmp_path / 'out'}" in made.output.replace("\n", "")
    )
    for arguments, words in (
        (["--format", "onnx"], "choose merged, awq, gguf or ollama"),
        (["--max-kl", "1"], "set both, or neither"),
    ):
        refused = CliRunner().invoke(app, ["a", "b", *arguments])
        assert isinstance(refused.exception, ConfigError) and words in str(refused.exception)


@pytest.mark.thorough  # tests/deploy/test_journey.py has an export answered by vLLM, through our server
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif("LYCEUM_VLLM" not in os.environ, reason="starts vLLM: LYCEUM_VLLM=1")
def test_vllm_answers_as_before_the_export(tmp_path):
    """`vllm serve`'s engine on the exported folder gives the greedy tokens of the adapter that was never merged."""
    import subprocess

    from student_trainer.export.merged import load_trained
    from student_trainer.export.trained import find_trained

    base = make_model(tmp_path / "base", "qwen2", hidden=128, num_hidden_layers=4)
    source = adapter_of(base, tmp_path / "adapter")
    export(Export(source, tmp_path / "out", **SMALL), QUIET)
    prompts = [[5, 6, 7, 8], list(range(30, 60)), [1, 2, 100, 200, 299]]
    script = (
        "import json, sys\nfrom vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=128, max_num_seqs=4)\n"
        "out = llm.generate([{'prompt_token_ids': p} for p in json.loads(sys.argv[2])], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))\n"
        "print('TOKENS', json.dumps([list(o.outputs[0].token_ids) for o in out]))\n"
    )
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "ask.py").write_text("if __name__ == '__main__':\n    " + script.replace("\n", "\n    "))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ask.py"), str(tmp_path / "out"), json.dumps(prompts)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("TOKENS")).removeprefix("TOKENS")
    )
    model, _ = load_trained(find_trained(source))
    expected = parity.answer(model, prompts, 16, [], lambda done: None).answers
    assert found == expected


def test_rows_that_cannot_be_used_are_counted_and_named(model_factory, tmp_path):
    """Unreadable lines and rows of no known shape, long prompts, and calibration rows that are cut: each has a line of its own."""
    rows = tmp_path / "rows.jsonl"
    long = "the cat sat " * 1500
    lines = [
        {"instruction": "Go on.", "output": "the cat"},
        {"instruction": 7, "output": "a mat"},
        {"instruction": long, "output": "a mat"},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    base = model_factory("qwen2")
    made = export(Export(base, tmp_path / "out", rows=str(rows), **SMALL), QUIET)
    bad, above = made.notes
    assert bad.startswith(f"bad rows of {rows}, left out: 2; the first is {rows}:4: ")
    assert above == "prompts that are empty or above 122 tokens, not asked: 1"
    assert json.loads((tmp_path / "out" / "export.json").read_text())["notes"] == list(made.notes)
    calibrated = Rows(AutoTokenizer.from_pretrained(base), str(rows), None)
    assert [len(ids) > 1 for ids in calibrated.whole(8)] == [True, True] and calibrated.cut == 1
    assert "calibration rows above 1,024 tokens, read as far as those: 1" in calibrated.notes
