"""A quiet tenant beside a noisy one with a valid token: nothing of its is refused, and it hardly waits longer.

The edge, the noisy tenant and the quiet one are processes of their own. `make soak` abuses for ten seconds each and holds
the medians within a factor of two; `make test` for about a second, on a machine that others use, with a wide bound.
"""

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teacher_wire.core.batch import TokenBatch
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.transport.channel import Credentials
from tests.e2e.conftest import free_port
from tests.e2e.test_server_lifecycle import make_certificates
from tests.faults.noisy_abuses import ABUSES
from tests.faults.noisy_server import VOCAB

SOAK = bool(os.environ.get("LYCEUM_SOAK"))
SECONDS = 10.0 if SOAK else 0.8
RATIO = 2.0 if SOAK else 25.0
MORE_MB = 300 if SOAK else 500  # the short run shares its machine with the rest of the suite
QUIET, NOISY = "q" * 24, "n" * 24
SPEC = spec_of("top_k", VOCAB, k=16)
FIGURES = ("abuse", "alone ms", "beside ms", "ratio", "longest ms", "asked", "refused", "RSS MB", "over idle")


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """(address, CA file, pid) of a serving process."""
    folder = tmp_path_factory.mktemp("noisy")
    ca, cert, key = make_certificates(folder)
    tokens = folder / "tokens"
    tokens.write_text(f"quiet {QUIET}\nnoisy {NOISY}\n")
    port = free_port()
    command = [sys.executable, "-m", "tests.faults.noisy_server", str(port), str(tokens), str(cert), str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout.readline() == b"ready\n"
        yield f"127.0.0.1:{port}", ca, process.pid
        process.kill()


@contextlib.contextmanager
def abuse(name, edge, seconds):
    address, ca, _ = edge
    command = [sys.executable, "-m", "tests.faults.noisy_abuses", address, str(ca), NOISY, name, str(seconds)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        try:
            yield
        finally:
            process.kill()


def rss_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Quiet:
    """The quiet tenant: one stream, one request of 512 tokens at a time, none of them twice."""

    def __init__(self, client, info, pid):
        self._client, self._info, self._pid = client, info, pid
        self._asked = 0
        self.rss_mb = 0.0

    async def latencies_ms(self, seconds):
        """Of every request of so many seconds."""
        until_s, took_ms = time.monotonic() + seconds, []
        while time.monotonic() < until_s or len(took_ms) < 5:
            self._asked += 1
            ids = [(self._asked * 31 + i * (self._asked % 97 + 1)) % VOCAB for i in range(512)]
            began_s = time.perf_counter()
            assert (await self._client.score(self._info, SPEC, TokenBatch.pack([ids]))).rows == 511
            took_ms.append((time.perf_counter() - began_s) * 1e3)
            self.rss_mb = max(self.rss_mb, rss_mb(self._pid))
        return took_ms


async def test_a_quiet_tenant_beside_twelve_abuses(edge, capsys):
    address, ca, pid = edge
    troubles, rows = [], []
    credentials = Credentials(ca_file=Path(ca), token=QUIET)
    async with TeacherClient(address, credentials=credentials, retry_for_s=0, on_trouble=troubles.append) as client:
        quiet = Quiet(client, await client.teacher(), pid)
        await quiet.latencies_ms(SECONDS / 2)
        idle_mb = rss_mb(pid)
        for name in ABUSES:
            alone_ms = statistics.median(await quiet.latencies_ms(min(2.0, SECONDS)))
            quiet.rss_mb = 0.0
            with abuse(name, edge, SECONDS * 3):
                await asyncio.sleep(min(1.0, SECONDS / 3))
                took_ms = await quiet.latencies_ms(SECONDS)
            beside_ms = statistics.median(took_ms)
            rows.append(
                (name, alone_ms, beside_ms, beside_ms / alone_ms, max(took_ms), len(took_ms), len(troubles),
                 quiet.rss_mb, quiet.rss_mb - idle_mb)
            )  # fmt: skip
    with capsys.disabled():
        print(f"\nquiet tenant, 512 tokens a request; idle edge {idle_mb:.0f} MB")
        print("".join(f"{figure:>13}" if number else f"{figure:24}" for number, figure in enumerate(FIGURES)))
        for name, *figures in rows:
            print(f"{name:24}" + "".join(f"{figure:13.2f}" for figure in figures))
    assert not troubles
    slow = {name: ratio for name, _, _, ratio, *_ in rows if ratio > RATIO}
    large = {row[0]: row[-1] for row in rows if row[-1] > MORE_MB}
    assert not slow, f"slower than {RATIO} times alone: {slow}"
    assert not large, f"MB above idle: {large}"
