"""Which HTTP proxy a connection takes: decided here from a setting or gRPC's own variables, so that an error can name it.

In: an address and `auto`, `none` or a URL; out: a `Route`. Traffic that stays on this machine never takes one.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from teacher_wire.core.errors import RequestError

AUTO, NONE = "auto", "none"
_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC's core reads the first of these that is set
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Route:
    """How an address is reached.

    Attributes:
        proxy: URL of the HTTP proxy, with its password if it has one; empty for none.
        variable: the environment variable that names it; empty if a setting does.
    """

    proxy: str = ""
    variable: str = ""

    def __str__(self) -> str:
        """For errors: never with a password; empty without a proxy."""
        if not self.proxy:
            return ""
        url = urlsplit(self.proxy)
        shown = f"{url.scheme}://{url.hostname}:{url.port}"
        whose = f"of ${self.variable} ({shown})" if self.variable else f"{shown} of teacher.proxy"
        return f"through the proxy {whose}; set teacher.proxy: none (or --proxy none) to go without it"

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """Channel options; gRPC looks at no variable of its own."""
        return [("grpc.http_proxy", self.proxy)] if self.proxy else [("grpc.enable_http_proxy", 0)]


def route_to(address: str, setting: str = AUTO, env: Mapping[str, str] | None = None) -> Route:
    """How HOST:PORT is reached.

    Args:
        address: HOST:PORT, or `unix:PATH`.
        setting: `auto` follows the environment, `none` goes straight, else the URL of a proxy.
        env: environment variables; the process's own if not given.

    Raises:
        RequestError: what names the proxy is no http:// URL.
    """
    if setting == NONE or stays_here(address):
        return Route()
    if setting != AUTO:
        return Route(proxy_url(setting))
    env = os.environ if env is None else env
    variable = next((name for name in _VARIABLES if env.get(name, "").strip()), "")
    host = _host(address)
    if not variable or any(_is_excepted(host, env.get(name, "")) for name in _EXCEPTIONS):
        return Route()
    return Route(proxy_url(env[variable], f"${variable}"), variable)


def proxy_url(text: str, field: str = "teacher.proxy") -> str:
    """The URL of a proxy with its scheme; its port is 80 if it has none, as gRPC has it.

    Raises:
        RequestError: it is no http:// URL. gRPC speaks to no other proxies, and would go straight without a word.
    """
    text = text.strip()
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        host, port = url.hostname, url.port or 80
    except ValueError:
        url, host, port = urlsplit(""), None, 0
    if url.scheme != "http" or not host or url.path.strip("/") or url.query:
        shown = text.rpartition("@")[2]  # a password may stand before it
        raise RequestError(
            "not the URL of an HTTP proxy; set teacher.proxy (or --proxy) to such a one, or to none",
            field=field, value=shown, limit="http://HOST:PORT",
        )  # fmt: skip
    user = f"{url.netloc.rpartition('@')[0]}@" if "@" in url.netloc else ""
    return f"http://{user}{f'[{host}]' if ':' in host else host}:{port}"


def stays_here(address: str) -> bool:
    """Whether a connection to the address cannot leave this machine."""
    if address.startswith("unix:"):
        return True
    host = _host(address)
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", "ip6-localhost", "ip6-loopback", "localhost.localdomain") or host.endswith(
            ".localhost"
        )
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified  # a connection to 0.0.0.0 arrives here too


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]").partition("%")[0].rstrip(".").lower()


def _is_excepted(host: str, exceptions: str) -> bool:
    """Whether a list such as `10.0.0.0/8,.example.com` names the host."""
    for entry in exceptions.lower().replace(" ", ",").split(","):
        name = entry.lstrip("*").lstrip(".")
        if entry == "*" or (name and (host == name or host.endswith(f".{name}"))):
            return True
        try:
            if entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
