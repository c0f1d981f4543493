"""Several machines on one: network namespaces behind a bridge, each with an address and a /tmp/ray of its own. Needs root.

In: how many; out: `Host`s that run commands, lose their network, and die as a whole. All is taken away at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BRIDGE = "lycbr0"
_NETWORK = "10.77.0"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Host:
    """One machine.

    Attributes:
        name: of its namespace.
        address: its own.
        folder: where its logs and its /tmp/ray are.
    """

    name: str
    address: str
    folder: Path
    processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *command: object, log: str, **env: str) -> subprocess.Popen:
        """Runs a command on this machine; its output goes to `folder/log`."""
        own = self.folder / "ray"
        own.mkdir(exist_ok=True)
        inside = f'mount --bind {own} /tmp/ray && exec "$@"'
        full = ["ip", "netns", "exec", self.name, "unshare", "--mount", "sh", "-c", inside, "sh", *map(str, command)]
        with (self.folder / log).open("a") as out:
            process = subprocess.Popen(
                full,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def read(self, log: str) -> str:
        path = self.folder / log
        return path.read_text() if path.exists() else ""

    def kill(self) -> int:
        """SIGKILL to everything on it; how many processes that were."""
        found = [int(pid) for pid in _ip("netns", "pids", self.name).split()]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        return len(found)

    def cut(self) -> None:
        """Takes its network cable out."""
        _ip("link", "set", f"v-{self.name}", "down")

    def plug(self) -> None:
        """Puts the cable back."""
        _ip("link", "set", f"v-{self.name}", "up")


@contextlib.contextmanager
def hosts(folder: Path, *names: str) -> Iterator[dict[str, Host]]:
    """Machines of these names; this process reaches them too, as `.254` of their network."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    made: dict[str, Host] = {}
    _ip("link", "add", _BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{_NETWORK}.254/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for number, name in enumerate(names, 1):
            own = f"lyc-{name}"
            _ip("netns", "add", own)
            made[name] = Host(own, f"{_NETWORK}.{number}", folder / name)
            made[name].folder.mkdir()
            _ip("link", "add", f"v-{own}", "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("link", "set", f"v-{own}", "master", _BRIDGE, "up")
            _ip("-n", own, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
            _ip("-n", own, "link", "set", "eth0", "up")
            _ip("-n", own, "link", "set", "lo", "up")
            _ip("-n", own, "route", "add", "default", "via", f"{_NETWORK}.254")
        yield made
    finally:
        for host in made.values():
            host.kill()
            _ip("netns", "del", host.name)
        _ip("link", "del", _BRIDGE)
