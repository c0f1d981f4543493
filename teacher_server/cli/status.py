"""`teacher-server status`: replicas, queues, speed, shares of tenants and stored labels of a running server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from teacher_server.cli.asking import (
    Address,
    CaFile,
    CertFile,
    KeyFile,
    Proxy,
    TokenEnv,
    client_of,
    explained,
    print_json,
)

if TYPE_CHECKING:
    from teacher_wire.core.status import ServerStatus

_WATCH_S = 1.0
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def status(
    address: Address,
    watch: Annotated[bool, typer.Option("--watch", help="show it anew every second until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, or one a second with --watch")] = False,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    token_env: TokenEnv = "LYCEUM_TOKEN",
    proxy: Proxy = "auto",
) -> None:
    """Show replicas, queues, speed, shares of tenants and stored labels of a running server."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.live import Live

    from teacher_server.cli.status_table import render

    async def show(tell: Callable[[ServerStatus], None]) -> None:
        async with client_of(address, ca_file, cert_file, key_file, token_env, proxy) as client:
            tell(await client.server_status())
            while watch:
                await asyncio.sleep(_WATCH_S)
                tell(await client.server_status())

    with contextlib.suppress(KeyboardInterrupt), explained(ca_file, cert_file):
        if as_json:
            asyncio.run(show(lambda found: print_json(asdict(found))))
        elif watch:
            with Live(console=Console(), auto_refresh=False) as live:
                asyncio.run(show(lambda found: live.update(render(found), refresh=True)))
        else:
            asyncio.run(show(lambda found: Console().print(render(found))))
