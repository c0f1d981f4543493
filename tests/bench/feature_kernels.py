"""The kernels of signals of layers alone, beside their plain versions: milliseconds per tapped layer at 7B shapes, and the distance between both.

A batch of 8 x 2,048 tokens (`--sequences`, `--tokens`): 28 query heads and 4 key heads of 128 channels, d_ff 18,944. Needs a CUDA device, or TRITON_INTERPRET=1 to try that
it comes to its table. Variants are lines of a table, so that one call on a lent card says which to ship. A forward pass of this batch takes about 350 ms on an H200.
    python -m tests.bench.feature_kernels [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from teacher_server.backends.transformers.capture import activation, sorting_kernel
from teacher_server.signals.captured import AttentionInputs, Captured
from teacher_server.signals.features import attention, pooling_kernel
from tests.bench.table import show

ROUNDS = 7


def main() -> None:
    """The bench; see module."""
    parser = argparse.ArgumentParser(description="Kernels of signals of layers, beside their plain versions.")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=18_944)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    rows = [*_pooled(options, device, dtype), *_quantiles(options, device, dtype)]
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted"
    title = f"kernels of signals, {options.sequences} x {options.tokens} tokens, {dtype}; {where}, torch {torch.__version__}"
    show(title, rows, as_json=options.json)
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "feature-kernels.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))


def _pooled(options: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    lengths = [options.tokens] * options.sequences
    captured = Captured(
        cu_tokens_B1=np.concatenate([[0], np.cumsum(lengths)]),
        position_R=np.tile(np.arange(options.tokens), options.sequences),
        sequence_R=np.repeat(np.arange(options.sequences), options.tokens),
    )
    torch.manual_seed(0)
    query = 2 * torch.randn(sum(lengths), options.heads, options.channels, device=device)
    key = torch.randn(sum(lengths), options.groups, options.channels, device=device)
    query, key = query.to(dtype), key.to(dtype)
    inputs = AttentionInputs(query, key, key, key, options.channels**-0.5)
    budget = attention._SCORE_BYTES[device]
    plain = attention.pooled(captured, inputs, budget)
    rows = [_row("attention, torch", lambda: attention.pooled(captured, inputs, budget), plain)]
    for tile in (64, 128):

        def tiled(tile: int = tile) -> Tensor:
            with mock.patch.object(pooling_kernel, "ROWS", tile):
                return pooling_kernel.pooled(captured, inputs)

        rows.append(_row(f"attention, kernel, tiles of {tile} rows", tiled, plain))
    return rows


def _quantiles(options: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    torch.manual_seed(0)
    shape = options.sequences * options.tokens, options.ffn
    u_RF = (torch.randn(shape, device=device) * torch.randn(shape, device=device)).to(dtype)

    def sorted_means() -> Tensor:
        with mock.patch.object(sorting_kernel, "usable", return_value=False):
            return activation.sorted_means(u_RF)

    plain = sorted_means()
    rows = [_row("quantiles, torch's sort", sorted_means, plain)]
    for programs in (264, 528, 1056):

        def counted(programs: int = programs) -> Tensor:
            with mock.patch.object(sorting_kernel, "_PROGRAMS", programs):
                return sorting_kernel.sorted_means(u_RF, 16)

        rows.append(_row(f"quantiles, counts, {programs} programs", counted, plain))
    rows.append(_row("energy", lambda: activation.energy(u_RF), activation.energy(u_RF)))
    return rows


def _row(name: str, function: Callable[[], Tensor], plain: Tensor) -> dict[str, object]:
    try:
        off = float((function().double() - plain.double()).abs().max())
        times = []
        for _ in range(ROUNDS if torch.cuda.is_available() else 1):
            _synchronize()
            began_s = time.perf_counter()
            function()
            _synchronize()
            times.append(time.perf_counter() - began_s)
    except Exception as error:  # a lent minute is not lost for one variant
        return {"what": name, "ms per layer": f"FAILED {error!r}"[:200], "most off": ""}
    return {"what": name, "ms per layer": round(statistics.median(times) * 1e3, 3), "most off": f"{off:.1e}"}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
