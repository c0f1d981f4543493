"""Answers of `full` on a real GPU: the same bits as gathered on the device, and the device never holds all of their rows.

On a machine without pytest's plugins: python3 -m pytest -c /dev/null --rootdir . --import-mode=importlib tests/gpu
"""

import pytest
import torch

from teacher_server.signals.base import Rows
from teacher_server.signals.reduce import OutputHead, reduce
from teacher_server.signals.transfer import HostRows, ToHost
from teacher_wire.core.axes import Axis
from teacher_wire.score.signals import spec_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS, WIDTH, VOCAB, CHUNK_BYTES = 8192, 256, 100_000, 128 << 20


def material():
    torch.manual_seed(0)
    head = OutputHead(torch.randn(VOCAB, WIDTH, dtype=torch.bfloat16, device="cuda"), None, 1.0, 0.0)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    return head, hidden, torch.arange(ROWS, device="cuda") % VOCAB


@pytest.mark.parametrize("spec", [spec_of("full", VOCAB), spec_of("top_k", VOCAB, k=16), spec_of("hidden", VOCAB)])
@torch.inference_mode()
def test_rows_sent_as_they_come_are_those_gathered_first(spec):
    head, hidden, labels = material()
    expected = ToHost(reduce(head, Rows(hidden, labels), spec, CHUNK_BYTES)).wait()
    rows = HostRows({Axis.ROW: ROWS}, CHUNK_BYTES)
    reduce(head, Rows(hidden, labels), spec, CHUNK_BYTES, rows)
    found = rows.end().wait()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@torch.inference_mode()
def test_the_device_never_holds_a_whole_full_answer(capsys):
    head, hidden, labels = material()
    spec, peaks = spec_of("full", VOCAB), []
    for streamed in (False, True):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if streamed:
            rows = HostRows({Axis.ROW: ROWS}, CHUNK_BYTES)
            reduce(head, Rows(hidden, labels), spec, CHUNK_BYTES, rows)
            rows.end().wait()
        else:
            ToHost(reduce(head, Rows(hidden, labels), spec, CHUNK_BYTES)).wait()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    answer = ROWS * VOCAB * 2
    with capsys.disabled():
        print(
            f"\nan answer of {answer / 2**20:.0f} MiB: peak {peaks[0] / 2**20:.0f} MiB gathered, {peaks[1] / 2**20:.0f} MiB streamed"
        )
    assert peaks[0] > answer
    assert peaks[1] < 8 * CHUNK_BYTES
