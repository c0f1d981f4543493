"""`teacher-server up`, and the hidden command that is the server itself, in the session that `up` makes for it.

Loads neither torch nor ray before the server starts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from teacher_server.cli.asking import ConfigPath, Overrides
from teacher_server.cli.journal import Journal, LogFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from teacher_server.control.config_watch import ConfigFile
    from teacher_server.control.supervisor import Server

SERVE = "serve-under-guard"
_STOP_S = 10.0  # beyond the drain: for the processes to end
_LEAVE_S = 60.0  # the same on a cluster that stays, from which our applications are removed
_LOOK_S = 0.5  # between two looks at the config file
UntilStdinCloses = Annotated[
    bool, typer.Option("--until-stdin-closes", help="also stop when standard input ends; for a parent process")
]
Format = Annotated[LogFormat, typer.Option("--log-format", help="of what the server says of itself on standard error")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
serve_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def up(
    config: ConfigPath,
    overrides: Overrides = None,
    until_stdin_closes: UntilStdinCloses = False,
    log_format: Format = "text",
) -> None:
    """Start every teacher and the edge, and follow changes of CONFIG; Ctrl-C drains and ends all of it."""
    from teacher_server.config.server import load_config
    from teacher_server.control import guard

    loaded = load_config(config, overrides)
    stop_within_s = loaded.edge.drain_s + (_STOP_S if loaded.ray.own else _LEAVE_S)
    command = [sys.executable, "-m", "teacher_server.cli", SERVE, str(config), *(overrides or [])]
    if until_stdin_closes:
        command.append("--until-stdin-closes")
    command += ["--log-format", log_format]
    raise SystemExit(guard.run(command, stop_within_s, Journal(log_format).say))


@serve_app.command(SERVE)
def serve_under_guard(
    config: ConfigPath,
    lifeline: Annotated[int, typer.Option(help="read end of the guard's pipe")],
    overrides: Overrides = None,
    until_stdin_closes: UntilStdinCloses = False,
    log_format: Format = "text",
) -> None:
    """The server itself, in the session that `up` makes for it."""
    from teacher_server.control.config_watch import ConfigFile
    from teacher_server.control.guard import Lifeline, handle
    from teacher_server.errors import RayEndedError, ServerConfigError
    from teacher_wire.core.errors import TeacherWireError

    journal = Journal(log_format)
    stop = threading.Event()
    serving = threading.Event()

    def give_up(*_: object) -> None:
        handle(signal.SIG_IGN)  # once is enough; the guard does not wait for ever
        raise KeyboardInterrupt

    def end(*_: object) -> None:  # SIGINT: a terminal's, or the guard's second word
        if stop.is_set():
            give_up()
        stop.set()

    def told_to_stop() -> None:
        if not serving.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        stop.set()

    def told_to_end() -> None:
        stop.set()
        os.kill(os.getpid(), signal.SIGINT)

    handle(give_up)
    try:
        Lifeline(lifeline, told_to_stop, told_to_end)
        if until_stdin_closes:
            threading.Thread(target=_at_end_of_input, args=(told_to_stop,), daemon=True).start()
        file = ConfigFile(config, overrides)
        loaded = file.config
        from teacher_server.control.launch import running
        from teacher_server.control.preflight import check

        if check(loaded) and loaded.ray.own:
            raise ServerConfigError(f"edge.port: another teacher-server listens on {loaded.edge.address} already")
        with running(loaded, journal.say) as server:
            handle(lambda *_: stop.set())  # systemd sends SIGTERM to us as well as to the guard: one stop
            signal.signal(signal.SIGINT, end)
            serving.set()
            how = "TLS" if loaded.edge.tls else "plain text, loopback only"
            journal.say(f"ready on {loaded.edge.address} ({how})")
            while not stop.wait(_LOOK_S):
                _follow(file, server, journal)
    except KeyboardInterrupt:
        journal.say("stopped at once")
        raise SystemExit(130) from None
    except RayEndedError as error:
        journal.error(f"{error}; stopped")
        os._exit(0 if stop.is_set() else 1)  # an orderly exit would wait for Ray
    except (ServerConfigError, TeacherWireError) as error:
        if log_format == "json":  # of a log, every line is an object
            journal.error(str(error))
            raise SystemExit(2) from None
        raise
    journal.say("stopped")


def _follow(file: ConfigFile, server: Server, journal: Journal) -> None:
    """One look at the config file, and one step towards what it says."""
    from teacher_server.errors import ServerConfigError

    try:
        changed = file.poll()
        if changed is not None:
            server.change(changed)
    except ServerConfigError as error:
        named = str(file.path) in str(error)
        journal.say(f"not followed: {error}" if named else f"{file.path}: not followed: {error}")
    server.step()


def _at_end_of_input(told_to_stop: Callable[[], None]) -> None:
    """A parent that is gone while the server starts is not waited for either."""
    while os.read(
        sys.stdin.fileno(), 4096
    ):  # without the lock of a stream, which the end of the interpreter would wait for
        pass
    told_to_stop()
