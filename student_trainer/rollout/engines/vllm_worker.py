"""The process of `engine: vllm`: one vLLM engine that writes completions and takes weights. The only module of this house that imports vllm.

In: JSON lines on standard input, the first one how to start; out: a JSON line per request on what was standard output. All that vLLM
prints goes to standard error. It ends when its input does, even amid a request, so that nothing outlives a trainer that was killed.
Tried with vLLM 0.32 on a CPU and 0.25.1 on GPUs.

    {"model": FOLDER, "arguments": {...}}                            -> {"ready": true, "max_model_len": ...}
    {"do": "load", "file": FILE}                                     -> {}
    {"do": "sample", "prompts": [[id, ...], ...], "seeds": [...], "params": {...}}
        -> {"samples": [{"ids": [...], "logp": [...], "finish": "stop" | "length", "likeliest": [[...], ...]}, ...]}
    anything that fails                                              -> {"error": "..."}
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from student_trainer.rollout.engines.mapped_weights import MappedWeights

_mapped: list[MappedWeights] = []  # the file of weights, once there was one to load


def main() -> None:
    """Serves until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    start = json.loads(lines.get())
    try:
        worker = Worker(start["model"], start["arguments"])
    except Exception as error:  # a process edge: whatever it is goes to the trainer in a sentence
        _reply(replies, {"error": _said(error)})
        os._exit(1)
    _reply(replies, {"ready": True, "max_model_len": worker.max_model_len})
    while True:
        request = json.loads(lines.get())
        try:
            answer = worker.load(request["file"]) if request["do"] == "load" else worker.sample(request)
        except Exception as error:
            answer = {"error": _said(error)}
        _reply(replies, answer)


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the trainer is gone, or has closed us


def _reply(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


class Worker:
    """One engine.

    Args:
        model: folder of config.json and weights; a tokenizer is not read.
        arguments: further ones of vLLM's `LLM`.
    """

    def __init__(self, model: str, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(model=model, skip_tokenizer_init=True, **arguments)
        self.max_model_len = int(self._llm.llm_engine.model_config.max_model_len)

    def load(self, file: str) -> dict[str, Any]:
        """Takes every weight of a checkpoint of the same shapes, in place."""
        self._llm.collective_rpc(_reload, args=(file,))
        self._llm.reset_prefix_cache()  # it holds states of the old weights
        return {}

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """One completion per prompt, in order."""
        from vllm import SamplingParams, TokensPrompt

        params = [
            SamplingParams(seed=seed, flat_logprobs=True, detokenize=False, ignore_eos=True, **request["params"])
            for seed in request["seeds"]
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
        answers = self._llm.generate(prompts, params, use_tqdm=False)
        return {"samples": [_sample(answer.outputs[0], request["params"]["logprobs"]) for answer in answers]}


def _sample(written: Any, likeliest: int) -> dict[str, Any]:
    """What has been written; at each token vLLM tells the token itself, then the likeliest."""
    flat = written.logprobs
    starts = flat.start_indices
    sample: dict[str, Any] = {
        "ids": [flat.token_ids[at] for at in starts],
        "logp": [flat.logprobs[at] for at in starts],
        "finish": written.finish_reason,
    }
    if sample["ids"] != list(written.token_ids):
        raise RuntimeError("vLLM's log-probabilities are of other tokens than it has written")
    if likeliest:
        sample["likeliest"] = [flat.token_ids[at + 1 : at + 1 + likeliest] for at in starts]
    return sample


def _reload(worker: Any, file: str) -> None:
    """Runs in vLLM's worker: what belongs to a layer is packed again as at the start."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.model_runner.reload_weights(weights_iterator=_weights(file))


def _weights(file: str) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, which is mapped once for as long as it is the same; vLLM copies them."""
    from safetensors import safe_open

    from student_trainer.rollout.engines.mapped_weights import MappedWeights

    if _mapped and _mapped[0].is_of(Path(file)):
        _mapped[0].register()  # it is updated in its place, and loaded again and again
    else:
        _mapped[:] = [MappedWeights(Path(file))]
    there = _mapped[0].tensors
    with safe_open(file, framework="pt") as weights:
        for name in sorted(weights.keys()):  # those of a layer together
            yield name, there[name] if name in there else weights.get_tensor(name)


if __name__ == "__main__":
    main()
