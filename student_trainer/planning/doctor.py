"""`student-trainer doctor`: everything around a run that can be wrong, each as one line with its fix; changes nothing, starts nothing.

In: a config, or none; out: checks. Whatever is broken, it goes on with the next: a dead teacher, a missing file, a wrong authority.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from student_trainer.config.run import TrainConfig, cache_folder, load_config
from student_trainer.config.teachers import TeacherConfig
from student_trainer.errors import ConfigError, StudentError
from student_trainer.model import adapters
from student_trainer.teachers.connect import check_way, credentials_of
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.diagnosis import certificates, machine
from teacher_wire.diagnosis.check import Check, surviving
from teacher_wire.endpoint.client import TeacherClient

_ANSWER_S = 10.0
# What is needed by some features alone: package -> bounds.
_OPTIONAL = {"vllm": "", "bitsandbytes": "", "lm-eval": "", "trackio": "", "wandb": ""}


def examine(path: Path | None, overrides: list[str] | None) -> Iterator[Check]:
    """All checks, in an order in which the first bad one is mostly the cause of the next.

    Args:
        path: of a run's config; None: the machine alone.
        overrides: of it.
    """
    yield from surviving("versions", lambda: machine.versions("student", _OPTIONAL))
    yield from surviving("GPU driver", machine.gpu)
    yield from surviving("torch", _torch)
    yield from surviving("file limits", machine.file_limits)
    yield from surviving("clock", machine.clock)
    config = None
    if path is not None:
        try:
            config = load_config(path, overrides)
            yield Check("ok", "config", f"{path}: can be read")
        except (ConfigError, OSError) as error:
            yield Check(
                "bad", "config", str(error), f"student-trainer plan {path} says the same; mend the line it names"
            )
    if config is None:
        yield from surviving("proxy", lambda: machine.proxies({}))
        return
    read = config
    yield from surviving("run.output_dir", lambda: machine.folder(read.run.output_dir, "run.output_dir"))
    yield from surviving(
        "run.cache_dir",
        lambda: machine.folder(cache_folder(read.run.cache_dir), "run.cache_dir", min(read.cache.max_gb, 50.0)),
    )
    yield from surviving("model.path", lambda: _model(read))
    ways = {teacher.address: teacher.proxy for teacher in read.every_teacher if teacher.address is not None}
    yield from surviving("proxy", lambda: machine.proxies(ways))
    for teacher in read.every_teacher:
        subject = f"teacher {teacher.called}".rstrip()
        yield from surviving(subject, lambda teacher=teacher, subject=subject: _teacher(read, teacher, subject))  # type: ignore[misc]


def _torch() -> Iterator[Check]:
    import torch

    built = torch.version.cuda
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(number)
            told = f"{torch.cuda.get_device_name(number)}: {free / 2**30:,.1f} of {whole / 2**30:,.1f} GiB are free (CUDA {built})"
            fix = "somebody else uses it: look at nvidia-smi" if free < whole / 2 else ""
            yield Check("note" if fix else "ok", "GPU", told, fix)
    elif built is None:
        yield Check(
            "note",
            "GPU",
            "this torch was built without CUDA",
            "on a machine with a GPU install a torch with CUDA (pytorch.org)",
        )
    else:
        yield Check(
            "bad",
            "GPU",
            f"torch has CUDA {built} and sees no GPU",
            "update the driver, and look at CUDA_VISIBLE_DEVICES",
        )


def _model(config: TrainConfig) -> Iterator[Check]:
    folder = Path(config.model.path).expanduser()
    if not folder.is_dir() and not adapters.looks_local(config.model.path):
        yield Check("ok", "model.path", f"{config.model.path} is taken from the hub, which was not asked")
        return
    try:
        adapters.find(config.model)
    except StudentError as error:
        yield Check("bad", "model.path", str(error), "correct model.path")
    else:
        yield Check("ok", "model.path", f"{folder} holds a model")


def _teacher(config: TrainConfig, teacher: TeacherConfig, subject: str) -> Iterator[Check]:
    """The way to one teacher, and whether it can do what the run asks."""
    if teacher.embedded is not None:
        there = teacher.embedded.is_file()
        what = f"it is started by the run from {teacher.embedded}" + ("" if there else ", which is no file")
        yield Check(
            "ok" if there else "bad",
            subject,
            what,
            f"teacher-server doctor {teacher.embedded}" if there else "correct teacher.embedded",
        )
        return
    assert teacher.address is not None
    try:
        check_way(teacher)
    except TeacherWireError as error:
        yield Check("bad", subject, str(error), "correct the file, the token or the address it names")
        return
    if teacher.ca_file is not None:
        for address in teacher.address.split(","):
            for found in certificates.handshake(address.strip(), teacher.ca_file, teacher.cert_file, teacher.key_file):
                yield found
                if found.state == "bad":
                    return
    try:
        info = asyncio.run(_described(teacher))
    except TeacherWireError as error:
        yield Check(
            "bad",
            subject,
            str(error),
            "start it (teacher-server up), or correct teacher.address, teacher.name or the token",
        )
        return
    yield Check("ok", subject, f"{info.name} at {teacher.address} answers: {info.architecture} {info.dtype}")
    yield from _capable(config, teacher, info, subject)


async def _described(teacher: TeacherConfig) -> TeacherInfo:
    assert teacher.address is not None
    async with TeacherClient(
        teacher.address, credentials=credentials_of(teacher), retry_for_s=0, answer_s=_ANSWER_S
    ) as client:
        return await client.teacher(teacher.name)


def _capable(config: TrainConfig, teacher: TeacherConfig, info: TeacherInfo, subject: str) -> Iterator[Check]:
    """What the run asks of it, against what it says that it gives."""
    asked: list[tuple[str, tuple[str, ...], str]] = []
    labels = config.labels_of(teacher)
    if config.loss.output is not None and labels.transport != "auto":
        asked.append((labels.transport, info.transports, "labels.transport"))
    if config.generate is not None:
        asked.append(("text", info.generates or (), "generate"))
    offered = ", ".join(info.transports)
    for kind, given, setting in asked:
        if setting == "generate":
            good = bool(given)
            what = f"it writes: {', '.join(given)}" if good else "it writes no text"
            yield Check("ok" if good else "bad", subject, what, "" if good else "ask a teacher with the role generate")
        elif kind in given:
            yield Check("ok", subject, f"it gives {kind} labels (of {offered})")
        else:
            yield Check(
                "bad",
                subject,
                f"{setting}={kind}, and it gives {offered}",
                f"set {setting} to one of these, or to auto",
            )
    if info.limits.max_sequence_tokens < config.data.max_tokens:
        yield Check(
            "note", subject, f"it takes {info.limits.max_sequence_tokens:,} tokens a sequence, and data.max_tokens is {config.data.max_tokens:,}",
            f"set data.max_tokens={info.limits.max_sequence_tokens}, or raise the server's limits if rows are that long",
        )  # fmt: skip
