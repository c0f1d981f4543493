"""Passes of the student's body recorded as CUDA graphs, all in one pool of memory.

In: a function, ids, and gradients that keep their place; out: passes that replay. What torch leaves behind when a recording ends badly is
mended here. The only room that knows CUDA graphs.

Axes: B sequences, L padded length, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from student_trainer.model.speed.cuda_graphs import Body, Gradients, NoRoomError, Outputs, Passes, gradients_of


class CudaRecorder:
    """On the current device; see `cuda_graphs.Recorder`. What a step needs at most is measured from when it is made."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._out_of_reach = 0  # bytes that torch holds and nobody but recordings can use
        torch.cuda.reset_peak_memory_stats()

    def check_room(self) -> None:
        """A recording holds on to what its passes need, and the losses beside them may need as much as ever.

        Raises:
            NoRoomError: less is free than twice of what a step has needed so far beyond what always lies there.
        """
        lying, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        free = torch.cuda.mem_get_info()[0] + max(0, torch.cuda.memory_reserved() - lying - self._out_of_reach)
        if free < 2 * (most - lying):
            raise NoRoomError(
                f"{free / 2**30:.1f} GiB of the GPU are free, and {2 * (most - lying) / 2**30:.1f} may be needed"
            )

    def record(self, run: Body, gradients: Gradients, ids_BL: Tensor) -> Passes:
        """Passes for ids of this shape; `ids_BL` becomes theirs.

        Raises:
            RuntimeError: something in `run` cannot be recorded.
        """
        recording, working = _stream(ids_BL.device), torch.cuda.current_stream()
        recording.wait_stream(working)
        with torch.cuda.stream(recording):  # libraries set up what they need for a stream the first time they see it
            outputs = run(ids_BL)
            gradients_of(outputs, tuple(map(torch.zeros_like, outputs)), gradients.parameters)
            del outputs
        working.wait_stream(recording)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._capture(forward, recording):
            outputs = run(ids_BL)
        grads = tuple(torch.zeros_like(output, memory_format=torch.contiguous_format) for output in outputs)
        with self._capture(backward, recording):
            gradients.add(gradients_of(outputs, grads, gradients.parameters))
        return _CudaPasses(ids_BL, tuple(output.detach() for output in outputs), grads, forward, backward)

    @contextlib.contextmanager
    def _capture(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
        """Other threads go on copying labels meanwhile, hence "thread_local"."""
        working = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            self._mend(working)
            raise

    def _mend(self, working: torch.cuda.Stream) -> None:
        """What torch (2.11) leaves behind when a capture ends badly.

        Its allocator goes on recording, so that no memory that two streams have used is ever given back, and keeps the pool; the stream of the
        recording stays the current one; and its generator believes in the recording, so that nothing random can be drawn again.
        """
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError, AttributeError):  # of its own interfaces, which may go
            torch._C._cuda_endAllocateToPool(device, self._pool)  # raises if the capture had ended well
            torch._C._cuda_releasePool(device, self._pool)
        torch.cuda.set_stream(working)
        generator, fresh = torch.cuda.default_generators[device], torch.Generator(f"cuda:{device}")
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh)

    def settle(self) -> None:
        """Gives back what the plain passes needed beside which recordings were tried; a recording cannot use what others hold."""
        torch.cuda.empty_cache()
        self._out_of_reach = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recorders: libraries keep some 66 MiB for each stream that they have seen."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _CudaPasses:
    ids_BL: Tensor
    outputs: Outputs
    grads: Outputs
    _forward: torch.cuda.CUDAGraph
    _backward: torch.cuda.CUDAGraph

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()
