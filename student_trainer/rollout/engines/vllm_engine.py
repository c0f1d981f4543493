"""`engine: vllm`: the student writes in a process of its own, by vLLM's running batches over paged memory.

In: prompts as token ids, and weights from time to time; out: completions. The process (`vllm_worker`) knows no adapters: it is given the
whole student, merged, as a file in memory. A process that dies is started once more with the weights it had and asked again; samples
name their own random streams, so that it writes the same. Its samples are reproducible up to the rounding of other batches, not to the bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import ModelError, RolloutError
from student_trainer.model.load import Student
from student_trainer.model.merged import MergedWriter, merged_state
from student_trainer.model.quantized.weights import parameter_count
from student_trainer.rollout.engines.hf_sampler import SLOT_TOKENS, Sampling
from student_trainer.rollout.engines.merged_file import MergedFile
from student_trainer.rollout.engines.vllm_room import dtype_of, sequence_bytes
from student_trainer.rollout.sample import Rollout, RolloutFailure, RolloutPrompt
from student_trainer.schedules import uniforms

_WEIGHTS = "model.safetensors"
_COMMAND = ("-m", "student_trainer.rollout.engines.vllm_worker")
_SAID = 600  # characters of its log in an error
_PROBE_TOKENS = 8
# Nats between the log-probabilities it tells and the student's own.
_PROBE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}


class VllmSampler:
    """A `Sampler`; see module.

    Args:
        student: whose weights it begins with, as version 0.
        sampling: how tokens are drawn; `batch` sequences are written at a time.
        vocab_rows: V, ids that may be drawn: those that student, teacher and tokenizer share.
        longest: tokens of the longest prompt and its completion that memory is kept for.
        narrowed: dtype that the learner's passes are computed in by autocast, and vLLM's weights and passes; None for the student's own.
        device: that vLLM writes on, of the student's kind; None for the student's own.
        threads: of torch, on a CPU.
        arguments: further ones of vLLM's `LLM`, for benches.

    Raises:
        RolloutError: no vLLM, settings or an architecture that it cannot write with, or no memory.
    """

    def __init__(
        self,
        student: Student,
        sampling: Sampling,
        vocab_rows: int,
        *,
        longest: int,
        narrowed: torch.dtype | None = None,
        device: torch.device | None = None,
        threads: int = 1,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        assert 1 in (sampling.temperature, sampling.top_p), "config/on_policy.py refuses it"
        if importlib.util.find_spec("vllm") is None:
            raise RolloutError(
                "on_policy.engine=vllm: vLLM is not installed; make setup-vllm, or set on_policy.engine=hf"
            )
        self.version = 0
        self._student = student
        self._writer = MergedWriter(student)
        self._sampling = sampling
        self._vocab_rows = vocab_rows
        self._longest = longest
        self._dtype = dtype_of(student, narrowed)
        self._device = device or student.outline.device
        self._arguments = self._usual_arguments() | dict(arguments or {})
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None
        self._log: TextIO | None = None
        self._file: MergedFile | None = None
        self._takes_places = True  # as far as is known
        self._folder = _folder_for(student, self._dtype)
        self._removed = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        try:
            self._write_weights({name: p for name, p in student.model.named_parameters() if p.requires_grad})
            self._start()
            self._try_loading()
            self._probe()
        except BaseException:
            self.close()
            raise

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See `Sampler`; the tensors may be the student's own, and are read before this returns."""
        try:
            self._write_weights(weights)
        except RolloutError as error:
            raise RolloutError(f"weights of version {version}: {error}") from error
        self._load()
        self.version = version

    def sample(self, prompts: Sequence[RolloutPrompt]) -> list[Rollout | RolloutFailure]:
        """See `Sampler`."""
        found: list[Rollout | RolloutFailure | None] = [None] * len(prompts)
        good = []
        for number, prompt in enumerate(prompts):
            why = self._hindrance(prompt)
            if why:
                found[number] = RolloutFailure(prompt, why)
            else:
                good.append(number)
        if good:
            for number, sample in zip(good, self._written([prompts[number] for number in good]), strict=True):
                found[number] = self._result(prompts[number], sample)
        return [result for result in found if result is not None]

    def close(self) -> None:
        """Ends the process; may come twice, and from another thread than the one that waits for an answer."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
        if self._log is not None:
            self._log.close()
        self._file = None  # its memory is given back with the folder
        self._removed()

    # ---------------------------------------------------------------- samples

    def _hindrance(self, prompt: RolloutPrompt) -> str:
        """Why a prompt cannot be answered; empty if it can."""
        tokens, most = prompt.token_ids.size, self._sampling.max_new_tokens
        if not tokens:
            return "its prompt is empty"
        if tokens + most > self._longest:
            return f"its prompt of {tokens} tokens and on_policy.max_new_tokens={most} are more than the {self._longest} tokens of a sequence"
        highest = int(prompt.token_ids.max())
        if highest >= self._vocab_rows:
            return f"its prompt has the id {highest}, and the ids of student and teacher end at {self._vocab_rows - 1}"
        return ""

    def _written(self, prompts: Sequence[RolloutPrompt]) -> list[dict[str, Any]]:
        sampling = self._sampling
        answer = self._ask({
            "do": "sample",
            "prompts": [prompt.token_ids.tolist() for prompt in prompts],
            "seeds": [self._seed(prompt) for prompt in prompts],
            "params": {
                "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
                "stop_token_ids": sorted(sampling.stop_ids), "logprobs": sampling.likeliest,
            },
        })  # fmt: skip
        return list(answer["samples"])

    def _seed(self, prompt: RolloutPrompt) -> int:
        """53 bits that name the random stream of a sample in vLLM, which draws by itself."""
        first = uniforms(self._sampling.seed, "rollout", prompt.step, np.array([prompt.slot * SLOT_TOKENS]))
        return int(first[0] * (1 << 53))

    def _result(self, prompt: RolloutPrompt, sample: Mapping[str, Any]) -> Rollout | RolloutFailure:
        ids_n, logp_n = np.array(sample["ids"], np.int32), np.array(sample["logp"], np.float32)
        if not ids_n.size or sample["finish"] not in ("stop", "length"):
            return RolloutFailure(prompt, f"vLLM ended its completion after {ids_n.size} tokens: {sample['finish']}")
        if not np.isfinite(logp_n).all():
            place = int(np.flatnonzero(~np.isfinite(logp_n))[0])
            return RolloutFailure(prompt, f"the student's logits after {place} tokens of its completion are not finite")
        likeliest = np.array(sample["likeliest"], np.int32) if self._sampling.likeliest else None
        return Rollout(prompt, ids_n, np.minimum(logp_n, 0.0), sample["finish"] == "stop", self.version, likeliest)

    def _load(self) -> None:
        """Has the weights taken that lie in the folder."""
        self._ask({"do": "load", "file": str(self._folder / _WEIGHTS)})

    def _try_loading(self) -> None:
        """Has the first weights taken once more: an engine that writes and takes no new ones is to be known before step 0.

        Raises:
            RolloutError: it does not take them, as vLLM 0.32 on a CPU those of mixtures of experts.
        """
        try:
            self._load()
        except RolloutError as error:
            what = f"as it was given the weights of {type(self._student.causal_lm).__name__} a second time"
            raise RolloutError(f"{error} ({what}; set on_policy.engine=hf)") from error

    @torch.no_grad()
    def _probe(self) -> None:
        """One completion, whose log-probabilities the student has too.

        Raises:
            RolloutError: vLLM computes another model.
        """
        tokens = min(_PROBE_TOKENS, self._longest - self._sampling.max_new_tokens)
        prompt = RolloutPrompt(0, 0, np.arange(3, 3 + tokens, dtype=np.int32) % self._vocab_rows, "probe")
        (sample,) = self._written([prompt])
        ids = torch.tensor([prompt.token_ids.tolist() + sample["ids"]], device=self._student.outline.device)
        was_training = self._student.model.training
        self._student.model.eval()
        try:
            states_nD = self._student.states(ids)[0, tokens - 1 : -1]
            z_nV = self._student.head(self._vocab_rows).logits(states_nD).float()
        finally:
            self._student.model.train(was_training)
        logp_nV = torch.log_softmax(z_nV / self._sampling.temperature, -1)
        own_n = logp_nV.gather(-1, ids[0, tokens:, None])[:, 0].cpu().numpy()
        off = float(np.abs(own_n - np.array(sample["logp"], np.float32)).max())
        if not off <= _PROBE_TOLERANCE[self._dtype]:
            raise RolloutError(
                f"on_policy.engine=vllm: its log-probabilities of {type(self._student.causal_lm).__name__} are not the student's (difference {off:.2g} "
                f"nats, tolerance {_PROBE_TOLERANCE[self._dtype]:g}); set on_policy.engine=hf"
            )

    # ---------------------------------------------------------------- process

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """An answer; a process that has died is started once more, with the weights that lie in its folder."""
        try:
            return self._exchange(request)
        except _GoneError:
            try:
                self._start()
                return self._exchange(request)
            except _GoneError as again:
                raise RolloutError(f"on_policy.engine=vllm: its process has died twice: {again}") from again

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        if not line:
            raise _GoneError(f"exit code {process.wait()}; its log ends with: {self._said()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RolloutError(f"on_policy.engine=vllm: {answer['error']}")
        return answer

    def _start(self) -> None:
        """Starts the process and waits until it has loaded the weights in its folder.

        Raises:
            RolloutError: vLLM refuses the model or the memory.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._log is None:
            self._log = (self._folder / "vllm.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, *_COMMAND],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True, env=self._environment(),
        )  # fmt: skip
        try:
            self._exchange({"model": str(self._folder), "arguments": self._arguments})
        except _GoneError as error:
            raise RolloutError(f"on_policy.engine=vllm: it does not start: {error}") from error

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            return " ".join((self._folder / "vllm.log").read_text(errors="replace").split())[-_SAID:] or "(nothing)"
        return "(nothing)"

    def _usual_arguments(self) -> dict[str, Any]:
        """vLLM's, for this student: memory for `batch` sequences and no more, since the student trains beside it."""
        device = self._device.type
        batch = self._sampling.batch
        each_bytes = sequence_bytes(self._student, self._dtype, self._longest, self._device)
        usual = {
            "dtype": str(self._dtype).removeprefix("torch."),
            "max_model_len": self._longest,
            "max_num_seqs": batch,
            "max_num_batched_tokens": max(8192, self._longest),
            "kv_cache_memory_bytes": (batch + 1) * each_bytes,
            "gpu_memory_utilization": 0.01,  # only asked for at the start; what it takes is said by kv_cache_memory_bytes
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs" if self._sampling.temperature == 1 else "processed_logprobs",
            "max_logprobs": max(1, self._sampling.likeliest),
            "disable_log_stats": True,
            "seed": 0,
        }  # fmt: skip
        if device == "cpu":
            # A seeded prompt that is computed in parts kills the engine on a CPU (vLLM 0.32).
            return usual | {"enforce_eager": True, "enable_chunked_prefill": False}
        # Whole decoding steps are captured without torch.compile, which takes a minute to start.
        sizes = sorted({1, 2, 4, *range(8, min(batch, 64), 8), *range(64, batch, 32), batch})
        return usual | {
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        }

    def _environment(self) -> dict[str, str]:
        wanted = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is left when it is killed
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the function that loads weights is called in this same process
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self._threads),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        if self._device.type == "cuda":
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            number = self._device.index if self._device.index is not None else torch.cuda.current_device()
            wanted["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number] if seen else str(number)
        return {**os.environ, **wanted}

    def _write_weights(self, trained: Mapping[str, Tensor]) -> None:
        """Puts the student into the folder, from where it is loaded and a new process starts: whole at first, then what training changes, in its place."""
        try:
            if (held := self._file) is not None:  # `close` may come from another thread
                held.update(trained)
                return
            fresh = self._folder / "fresh"
            state = merged_state(self._student, trained, self._dtype)
            self._writer.write(state, fresh, self._dtype, vocab_rows=self._vocab_rows)
            for file in fresh.iterdir():
                file.replace(self._folder / file.name)
            if self._takes_places:
                self._file = MergedFile.of(self._student, self._folder / _WEIGHTS)
                self._takes_places = self._file is not None
        except ModelError as error:
            raise RolloutError(f"on_policy.engine=vllm: {error}") from error
        except OSError as error:
            raise RolloutError(
                f"on_policy.engine=vllm: the weights cannot be written into {self._folder}: {error}"
            ) from error


class _GoneError(Exception):
    """The process has ended; with what it left."""


def _folder_for(student: Student, dtype: torch.dtype) -> Path:
    """A folder of this process's own in memory, where there is room for two copies of the weights, else among temporary files."""
    needed = 2 * parameter_count(student.causal_lm) * dtype.itemsize
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > needed + (64 << 20)
    return Path(tempfile.mkdtemp(prefix="lyceum-vllm-", dir=shared if in_memory else None))
