"""What has to be known of a loaded model before it may write: where its texts end, and that its cache can be trusted."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from teacher_server.backends.transformers.decode_loop import ModelStepper
from teacher_server.decoding.sequence_queue import Sequence
from teacher_wire.generate.messages import Sample, SamplingSpec

log = logging.getLogger(__name__)
_PROBES = (5, 9)  # tokens of two prompts of different lengths, so that padding is probed too
_WRITTEN = 3


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: of the generation config and of the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in (*listed, tokenizer.eos_token_id) if token_id is not None)


@torch.inference_mode()
def writes_as_it_scores(stepper: ModelStepper, body: Any, device: torch.device, vocab_rows: int) -> bool:
    """Whether greedy writing in a padded, cached batch gives the log-probabilities of one plain forward pass.

    False for models whose state between tokens is something else than keys and values.
    """
    spec = SamplingSpec(temperature=0.0, max_new_tokens=_WRITTEN, ignore_eos=True)
    prompts = [(np.arange(1, tokens + 1) * 7919 % vocab_rows).astype(np.int32) for tokens in _PROBES]
    running = [Sequence(number, 0, number, 0, prompt, spec) for number, prompt in enumerate(prompts)]
    outcomes: dict[int, Any] = {}
    try:
        for step in range(_WRITTEN):
            outcomes |= dict(stepper.step(running if step == 0 else [], []))
    except Exception as error:  # a model's own code, which raises what it likes
        log.warning("this model does not generate: %s: %s", type(error).__name__, error)
        return False
    for prompt, sequence in zip(prompts, running, strict=True):
        sample = outcomes.get(sequence.number)
        if not isinstance(sample, Sample):
            return False
        ids_1L = torch.from_numpy(np.concatenate([prompt, sample.token_ids_n]).astype(np.int64))[None].to(device)
        state_nD = body(input_ids=ids_1L, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logp_nV = stepper.logp(state_nD).cpu()
        told_n = logp_nV.gather(-1, torch.from_numpy(sample.token_ids_n).long()[:, None])[:, 0].numpy()
        if not np.allclose(told_n, sample.token_logp_n, atol=stepper.tolerance):
            worst = float(np.abs(told_n - sample.token_logp_n).max())
            log.warning("this model does not generate: with its cache it is off by %.3g nats", worst)
            return False
    return True
