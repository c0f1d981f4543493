"""The student's own samples on a real GPU: what was drawn is what its passes say, twice the same, beside recorded passes of the trainer."""

import io
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.model.load import load_student
from student_trainer.rollout.engines.hf_sampler import HfSampler, Sampling
from student_trainer.rollout.sample import RolloutPrompt
from student_trainer.training.run import train
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.training.test_train import losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
QUIET = Console(file=io.StringIO())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_are_the_students_and_twice_the_same(model_factory, rows, top_p):
    student = load_student(ModelConfig(path=str(model_factory("qwen2", hidden=64)), dtype="bfloat16"), 0)
    rng = np.random.default_rng(0)
    prompts = [RolloutPrompt(1, i, rng.integers(3, 300, 5 + i).astype(np.int32), str(i)) for i in range(rows)]
    first, second = (HfSampler(student, Sampling(0, 20, top_p=top_p), 300).sample(prompts) for _ in range(2))
    student.model.eval()
    for one, other in zip(first, second, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.logp_n.tolist() == other.logp_n.tolist()
        ids_1L = torch.tensor(
            [[*one.prompt.token_ids.tolist(), *one.token_ids.tolist()]], device=student.outline.device
        )
        with torch.no_grad():
            logp_LV = student.model(input_ids=ids_1L).logits[0].float().log_softmax(-1).cpu()
        wanted = logp_LV[one.prompt.token_ids.size - 1 : -1].gather(-1, torch.tensor(one.token_ids).long()[:, None])[
            :, 0
        ]
        np.testing.assert_allclose(one.logp_n, wanted, atol=0.1)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one_beside_recorded_passes(model_factory, rows_file, tmp_path, staleness):
    model = model_factory("qwen2", hidden=64)
    with serve(fake_for(model)) as server:

        def go(name, resume=False):
            tree = run_config(
                tmp_path, model, rows_file, server.address,
                run={"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")},
                model={"lora": {"rank": 4}}, data={"eval": []}, train={"max_steps": 12, "save_steps": 4, "keep_checkpoints": 9},
                on_policy={"share": 0.7, "max_new_tokens": 12, "max_staleness": staleness},
            )  # fmt: skip
            return train(parse_config(tree, "test"), resume=resume, console=QUIET).output_dir

        straight = go("straight")
        broken = shutil.copytree(straight, tmp_path / "broken")
        for name in ("final", "checkpoint-8", "checkpoint-12"):
            shutil.rmtree(broken / name)
        (broken / "result.json").unlink()
        go("broken", resume=True)
        assert losses(broken) == losses(straight)
        assert (broken / "rollouts.jsonl").read_text() == (straight / "rollouts.jsonl").read_text()
