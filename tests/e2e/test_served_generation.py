"""Samples that came through Ray Serve and gRPC: the model's own, and no longer made once nobody wants them."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_wire.core.errors import LimitError, RequestError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import PromptBatch, SamplingSpec
from tests.e2e.conftest import server_config, serving, transformers_teacher

pytestmark = pytest.mark.ray
PROMPTS = [[5, 6, 7], [9] * 30, [1, 2]]
LONG = 30_000  # tokens: minutes of writing


@pytest.fixture(scope="module")
def writer(tmp_path_factory, model_factory):
    """A teacher that writes one sequence at a time."""
    model = model_factory("qwen2", seed=5, hidden=48, max_position_embeddings=LONG + 64)
    teacher = transformers_teacher("writer", model, generation={"max_running": 1, "max_new_tokens": LONG})
    with serving(tmp_path_factory.mktemp("writer"), server_config(teacher)) as server:
        server.model = model
        yield server


async def test_served_samples_are_the_models_and_end_with_their_caller(writer):
    model = AutoModelForCausalLM.from_pretrained(writer.model, dtype=torch.float32).eval()
    async with TeacherClient(writer.address) as client:
        info = await client.teacher()
        assert info.generates == ("tokens", "json_schema")
        endless = client.generate(info, SamplingSpec(max_new_tokens=LONG, ignore_eos=True), PromptBatch.pack([[3]] * 4))
        begun = asyncio.create_task(anext(endless))
        await asyncio.sleep(1.0)  # long enough to be under way, or to be cancelled before it is: both must end it
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
        spec = SamplingSpec(temperature=0.0, max_new_tokens=6)
        async with asyncio.timeout(60):
            got = {
                s.prompt: s.token_ids_n.tolist() async for s in client.generate(info, spec, PromptBatch.pack(PROMPTS))
            }
        for number, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                while ids.shape[1] < len(prompt) + len(got[number]):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert ids[0, len(prompt) :].tolist() == got[number]
        with pytest.raises(LimitError):
            await anext(client.generate(info, SamplingSpec(samples=65), PromptBatch.pack(PROMPTS)))
        call = client.generate(
            info, SamplingSpec(json_schema='{"enum":[1e400]}', max_new_tokens=4), PromptBatch.pack([[1]])
        )
        with pytest.raises(RequestError):  # Python reads an infinity, xgrammar knows no number
            await anext(call)
