"""One way to open HTTP clients and to describe replies, for all servers that the library talks to."""

import os
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx2

Client = TypeVar("Client", httpx2.Client, httpx2.AsyncClient)
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def open_client(kind: type[Client], url: str, *, limits: httpx2.Limits | None = None, **options: Any) -> Client:
    """
    Open a client for one server. The proxies of environment variables (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`) apply
    unless the server is on this machine, which a proxy cannot reach.

    Args:
        kind (`type`):
            `httpx2.Client` or `httpx2.AsyncClient`.
        url (`str`):
            Address of the server.
        limits (`httpx2.Limits`, *optional*):
            Limits of connections.
        options:
            Other arguments of the client.

    Raises:
        `ValueError`: If a proxy cannot be used, see [`check_proxies`].
    """
    limits = limits or httpx2.Limits()
    if is_local(url):  # with a transport of its own, a client ignores proxies, but no other variables
        if issubclass(kind, httpx2.AsyncClient):
            return kind(transport=httpx2.AsyncHTTPTransport(limits=limits), **options)
        return kind(transport=httpx2.HTTPTransport(limits=limits), **options)
    check_proxies(url)
    return kind(limits=limits, **options)


def is_local(url: str) -> bool:
    """
    Whether a server is on this machine: its host is `localhost`, a loopback address (`127.0.0.0/8`, `::1`) or the
    address of all interfaces (`0.0.0.0`, `::`).

    Args:
        url (`str`):
            Address of the server.
    """
    host = httpx2.URL(url).host.lower().removesuffix(".")
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def check_proxies(url: str) -> None:
    """
    Check that the proxies of environment variables can be used.

    Args:
        url (`str`):
            Address of a server. For a server on this machine, the variables do not apply.

    Raises:
        `ValueError`: If a variable names a SOCKS proxy and the package for it is missing, or another kind of proxy.
    """
    if is_local(url) or "*" in _environment("no_proxy")[1].replace(" ", "").split(","):
        return
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        name, value = _environment(variable)
        scheme = value.partition("://")[0].lower() if "://" in value else "http"
        if scheme not in _PROXY_SCHEMES:
            raise ValueError(
                f"The environment variable {name} names a proxy of the kind {scheme!r}, which is not one of "
                f"{', '.join(_PROXY_SCHEMES)}. Change or unset it."
            )
        if scheme.startswith("socks") and find_spec("socksio") is None:
            raise ValueError(
                f"The environment variable {name} names a SOCKS proxy, which needs the package socksio: `pip install "
                "socksio`, or unset the variable."
            )


def describe_reply(reply: httpx2.Response) -> str:
    """
    The status and the beginning of a reply, for messages.

    Args:
        reply (`httpx2.Response`):
            The reply. Of a redirect, the address to which it points is named, without a password.
    """
    if reply.has_redirect_location:
        target = reply.headers["location"]
        with suppress(httpx2.InvalidURL):
            target = str(reply.url.join(target).copy_with(username=None, password=None))
        return f"HTTP {reply.status_code}: it redirects to {target}. Redirects are not followed: use the final address."
    return f"HTTP {reply.status_code}: {reply.content[:300].decode(errors='replace') or reply.reason_phrase}"


def _environment(variable: str) -> tuple[str, str]:
    """The name and the value of a variable, of which the lower-case form has priority."""
    for name in (variable, variable.upper()):
        if value := os.environ.get(name):
            return name, value
    return variable.upper(), ""
