"""Checks of this machine: versions, folders, file limits, clock, proxies. The standard library alone; nothing is written."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from teacher_wire.diagnosis.check import Check
from teacher_wire.transport.proxy import route_to

_VARIABLES = (
    "grpc_proxy",
    "https_proxy",
    "http_proxy",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "no_grpc_proxy",
    "no_proxy",
    "NO_PROXY",
)
FEW_FILES = 4096  # descriptors; a server holds one or two per student, a student some per label request
_COMPARE = {
    ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip


def versions(extra: str, optional: Mapping[str, str], distribution: str = "lyceum-distill") -> Iterator[Check]:
    """Python and every package that an extra of our distribution names, against its bounds.

    Args:
        extra: `student` or `teacher`.
        optional: packages that need not be there, and their bounds; "" for none.
    """
    yield (
        Check("ok", "python", f"Python {sys.version.split()[0]}")
        if sys.version_info >= (3, 11)
        else Check(
            "bad", "python", f"Python {sys.version.split()[0]} is older than 3.11", "install Python 3.11 or newer"
        )
    )
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
        yield Check(
            "note", distribution, f"{distribution} is not installed as a package, so the bounds of its versions are unknown",
            "install it, as with pip install -e .",
        )  # fmt: skip
    for name, bounds in needed(lines, extra).items():
        yield version(name, bounds, needed=True)
    for name, bounds in optional.items():
        yield version(name, bounds, needed=False)


def needed(requirements: Sequence[str], extra: str) -> dict[str, str]:
    """Name -> bounds of what an installation with an extra needs, from the lines of a package's metadata."""
    found = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        wanted = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if wanted is not None and wanted[1] != extra:
            continue
        parts = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", requirement)
        if parts is not None:
            found[parts[1]] = parts[2].strip()
    return found


def version(name: str, bounds: str, *, needed: bool) -> Check:
    """Whether a package is there in a version that the bounds allow."""
    told = f" ({bounds})" if bounds else ""
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if needed:
            return Check("bad", name, f"{name} is not installed{told}", f"pip install '{name}{bounds}'")
        return Check("ok", name, f"{name} is not installed, and not needed unless it is asked for{told}")
    if not within(installed, bounds):
        fix = f"pip install '{name}{bounds}'"
        return Check("bad" if needed else "note", name, f"{name} {installed} is outside of {bounds}", fix)
    return Check("ok", name, f"{name} {installed}{told}")


def within(installed: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ">=2.11,<2.14"; release numbers count, local and pre-release parts do not."""
    ours = _numbers(installed)
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        parts = re.match(r"(>=|<=|==|!=|<|>)\s*(.+)", bound)
        if parts is None:
            continue
        theirs = _numbers(parts[2])
        width = max(len(ours), len(theirs))
        if not _COMPARE[parts[1]](ours + (0,) * (width - len(ours)), theirs + (0,) * (width - len(theirs))):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text.strip())
    return tuple(map(int, found[0].split("."))) if found else ()


def folder(path: Path, subject: str, needs_gb: float = 1.0) -> Iterator[Check]:
    """Whether a folder, or the nearest one above it, can be written to, and how much room its disk has; it is not made."""
    nearest = next((parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()), Path("/"))
    if not nearest.is_dir():
        yield Check("bad", subject, f"{path}: {nearest} is a file", "choose another folder")
        return
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        yield Check(
            "bad", subject, f"{path}: its disk is mounted read-only", "choose another folder, or mount it writable"
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield Check(
            "bad", subject, f"{path}: this user may not write to {nearest}", "choose another folder, or give it rights"
        )
    else:
        free = shutil.disk_usage(nearest).free
        told = f"{path}: can be written, {free / 2**30:,.1f} GiB are free"
        yield (
            Check("ok", subject, told)
            if free >= needs_gb * 2**30
            else Check("note", subject, told, f"make room: {needs_gb:,.0f} GiB may be wanted")
        )


def file_limits(wanted: int = FEW_FILES) -> Iterator[Check]:
    """How many files this process may open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = (
        f"{soft:,} files may be open at a time" if soft != resource.RLIM_INFINITY else "any number of files may be open"
    )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = "" if hard == resource.RLIM_INFINITY or hard >= wanted else f" (the hard limit is {hard:,}: ask root)"
        yield Check("note", "file limits", told, f"ulimit -n {wanted}{most}")
    else:
        yield Check("ok", "file limits", told)


def clock(now_s: float | None = None) -> Iterator[Check]:
    """Whether the clock is not behind the files of this very program: certificates and label stores go by it."""
    now = time.time() if now_s is None else now_s
    written = Path(__file__).stat().st_mtime
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < written - 86_400:
        yield Check(
            "bad", "clock", f"the clock says {shown}, which is before this program was installed",
            "set it (timedatectl set-ntp true): certificates are refused by a wrong clock",
        )  # fmt: skip
    else:
        yield Check("ok", "clock", f"{shown}, not before this program was installed")


def proxies(ways: Mapping[str, str], env: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Which proxy each address would be reached through.

    Args:
        ways: HOST:PORT -> its setting `proxy`.
        env: environment variables; the process's own if not given.
    """
    env = os.environ if env is None else env
    named = [name for name in _VARIABLES if env.get(name)]
    for address, setting in ways.items():
        for one in (part.strip() for part in address.split(",")):
            try:
                way = str(route_to(one, setting, env))
            except Exception as error:
                yield Check("bad", "proxy", str(error), "mend the variable, or set teacher.proxy: none")
                continue
            if way:
                yield Check("note", "proxy", f"{one} is reached {way.partition(';')[0]}", way.partition("; ")[2])
            else:
                yield Check("ok", "proxy", f"{one} is reached without a proxy")
    if not ways:
        yield Check("ok", "proxy", f"set in the environment: {', '.join(named) or 'none'}")


def gpu() -> Iterator[Check]:
    """The driver, as nvidia-smi tells of it; torch's view is its own house's."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Check("note", "GPU driver", "there is no nvidia-smi", "install NVIDIA's driver if this machine has a GPU")
        return
    asked = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        yield Check(
            "bad", "GPU driver", "nvidia-smi does not answer within 20 s", "look at dmesg; a hung driver needs a reboot"
        )
        return
    if found.returncode:
        said = (found.stdout + found.stderr).strip()[:200]
        yield Check("bad", "GPU driver", f"nvidia-smi fails: {said}", "load or reinstall the driver")
    for line in filter(None, found.stdout.splitlines() if not found.returncode else ()):
        yield Check("ok", "GPU driver", line)
