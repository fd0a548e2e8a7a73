"""One way to open HTTP clients and to describe replies, for all servers that the library talks to."""

import os
import re
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx2

Client = TypeVar("Client", httpx2.Client, httpx2.AsyncClient)
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def check_url(url: Any, label: str = "`url`", schemes: Collection[str] = ("http", "https")) -> httpx2.URL:
    """
    Check the address of a server. No request is sent.

    Args:
        url (`str`):
            The address.
        label (`str`, *optional*, defaults to `` "`url`" ``):
            What the address is called in error messages.
        schemes (`Collection[str]`, *optional*, defaults to `("http", "https")`):
            The schemes that are possible.

    Returns:
        `httpx2.URL`: The parsed address.

    Raises:
        `ValueError`: If the address has no host, another scheme or an impossible port. The message shows no password.
    """
    shown = re.sub("(?<=//).*@", "***@", repr(url))
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(
            f"{label} is not a URL ({error}), got {shown}. Expected one like 'http://localhost:8000'."
        ) from error
    if parsed.scheme not in schemes or not parsed.host:
        raise ValueError(f"{label} must be like 'http://localhost:8000', got {shown}.")
    if parsed.port is not None and not 1 <= parsed.port <= 65535:
        raise ValueError(f"{label} must have a port from 1 to 65535, got {shown}.")
    return parsed


def without_password(url: httpx2.URL | str) -> str:
    """
    An address as messages and results may show it.

    Args:
        url (`httpx2.URL` or `str`):
            The address, possibly with a user name and a password.
    """
    return str(httpx2.URL(url).copy_with(username=None, password=None))


def check_header(value: Any, label: str) -> None:
    """
    Check the value of a header.

    Args:
        value (`str`):
            The value. Error messages do not show it, because it may be secret.
        label (`str`):
            What the value is called in error messages.

    Raises:
        `ValueError`: If the value cannot be sent.
    """
    if not (isinstance(value, str) and value.isascii() and value.isprintable() and value == value.strip()):
        raise ValueError(f"{label} must be printable ASCII, without a line feed and without spaces at its ends.")


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
        `ValueError`: If a proxy cannot be used, see [`check_proxies`], or if the file of `SSL_CERT_FILE` cannot.
    """
    limits = limits or httpx2.Limits()
    check_proxies(url)
    try:
        if not is_local(url):
            return kind(limits=limits, **options)
        # With a transport of its own, a client ignores proxies, but no other variables
        if issubclass(kind, httpx2.AsyncClient):
            return kind(transport=httpx2.AsyncHTTPTransport(limits=limits), **options)
        return kind(transport=httpx2.HTTPTransport(limits=limits), **options)
    except OSError as error:  # certificates are read even for http, and no connection is opened yet
        raise ValueError(
            "The certificates of authorities cannot be read: correct or unset the environment variable SSL_CERT_FILE "
            f"({os.environ.get('SSL_CERT_FILE')!r}). {error}"
        ) from error


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
        `ValueError`: If a variable names a SOCKS proxy and the package for it is missing, another kind of proxy, or an
            address that cannot be one.
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
        if value:
            address = value if "://" in value else f"http://{value}"
            check_url(address, f"The proxy of the environment variable {name}", _PROXY_SCHEMES)


def lasting_failure(error: Exception) -> str | None:
    """
    Explain a failed connection that would fail again.

    Args:
        error (`Exception`):
            The error of the client.

    Returns:
        `str` or `None`: What is wrong and a remedy. `None` if the failure may be temporary.
    """
    text = str(error)
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return f"The server does not encrypt: use http:// instead of https:// ({text})."
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"Its certificate is not trusted: set the environment variable SSL_CERT_FILE to that of its authority ({text})."
    return None


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
            target = without_password(reply.url.join(target))
        return f"HTTP {reply.status_code}: it redirects to {target}. Redirects are not followed: use the final address."
    return f"HTTP {reply.status_code}: {reply.content[:300].decode(errors='replace') or reply.reason_phrase}"


def _environment(variable: str) -> tuple[str, str]:
    """The name and the value of a variable, of which the lower-case form has priority."""
    for name in (variable, variable.upper()):
        if value := os.environ.get(name):
            return name, value
    return variable.upper(), ""
