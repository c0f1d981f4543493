"""`teacher-server describe`: who the teachers of a running server are."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import typer

from teacher_server.cli.asking import (
    Address,
    AsJson,
    CaFile,
    CertFile,
    KeyFile,
    Proxy,
    TokenEnv,
    client_of,
    explained,
    print_json,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def describe(
    address: Address,
    as_json: AsJson = False,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    token_env: TokenEnv = "LYCEUM_TOKEN",
    proxy: Proxy = "auto",
) -> None:
    """Ask a running server who its teachers are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    async def ask() -> None:
        async with client_of(address, ca_file, cert_file, key_file, token_env, proxy) as client:
            found = await client.describe()
        if as_json:
            print_json({"address": address, "teachers": [asdict(info) for info in found]})
            return
        for info in found:
            table = Table(title=escape(info.name), show_header=False, title_justify="left")
            for field, value in vars(info).items():
                table.add_row(field, escape(", ".join(map(str, value)) if isinstance(value, tuple) else str(value)))
            Console().print(table)

    with explained(ca_file, cert_file):
        asyncio.run(ask())
