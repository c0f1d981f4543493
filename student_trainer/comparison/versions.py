"""What a run was computed with: versions of the libraries and the device, as text for a report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_LIBRARIES = ("lyceum-distill", "torch", "transformers", "peft", "tokenizers", "datasets", "bitsandbytes")


def versions() -> dict[str, str]:
    """Name -> version; without the libraries that are not installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "system": f"{platform.system()} {platform.machine()}", "device": device_name()}


def device_name() -> str:
    """The student's device in words."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def gpus() -> int:
    """GPUs that a student's process computes on: one, where there is one."""
    return 1 if torch.cuda.is_available() else 0
