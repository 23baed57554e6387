"""Validation of ``--url``: the URL of a broker, or of several nodes of a cluster.

No error text contains anything before the last ``@`` of a URL, which may be a password. Errors of
``urlsplit`` and ``yarl`` quote their input, so none of them is passed on.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from yarl import URL

# A password or a vhost may contain a comma; it is a separator only before another URL.
_BETWEEN = re.compile(r"\s*,\s*(?=amqps?://)")
_CREDENTIALS = re.compile(r"(\b[a-z]+://)\S*@", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_AUTHORITY_END = re.compile(r"[/?#]")
_TLS_OPTIONS = ("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl")
_OPTIONS = (*_TLS_OPTIONS, "auth")
_VALUES = {"no_verify_ssl": {"0", "1"}, "auth": {"plain", "external"}}
_QUOTED = "#/?@:%[] "
_MAX_VHOST = 127
_FORM = "write amqp://user:password@host:port/vhost or amqps://…"
_QUOTE = f"{_FORM}, and in the user, the password and the vhost, write " + ", ".join(
    f"'{char}' as %{ord(char):02X}" for char in _QUOTED
)


def split_urls(text: str) -> list[str]:
    """Split one or more comma-separated URLs.

    >>> split_urls("amqp://me:a,b@one/v, amqp://me:a,b@two/v")
    ['amqp://me:a,b@one/v', 'amqp://me:a,b@two/v']
    """
    return _BETWEEN.split(text.strip())


def parse_urls(text: str) -> list[URL]:
    """Parse the URLs of a broker's nodes; raise ``UsageError`` if they are invalid or disagree."""
    urls = [_parse(url) for url in split_urls(text)]
    if len({url.path for url in urls}) > 1:
        raise UsageError(
            "the URLs in --url name different vhosts; put the same /vhost at the end of every URL, "
            "because the nodes of a cluster share their vhosts"
        )
    return urls


def display_url(url: URL) -> str:
    """Return a URL for display, without user, password and options."""
    return str(url.with_password(None).with_user(None).with_query(None).with_fragment(None))


def without_credentials(text: str) -> str:
    """Return a text with user and password removed from every URL in it.

    >>> without_credentials("<Connection: 'amqp://me:p@ss@host/v'> closed")
    "<Connection: 'amqp://host/v'> closed"
    """
    return _CREDENTIALS.sub(r"\1", text)


def tls_context(url: str) -> ssl.SSLContext | None:
    """Return the TLS context for a URL; None for ``amqp://``.

    The options of the URL are those of aio_pika: ``cafile``, ``capath`` or ``cadata`` for the CAs
    to trust, ``certfile`` and ``keyfile`` for our own certificate, and ``no_verify_ssl=1`` to
    accept any certificate.

    Raises:
        UsageError: if one of the files cannot be used.
    """
    split = urlsplit(url)
    if split.scheme != "amqps":
        return None
    options = {name: values[-1] for name, values in parse_qs(split.query).items()}
    folder = options.get("capath")
    file = options.get("cafile") or folder or "?cadata="
    try:
        if folder and not Path(folder).is_dir():  # OpenSSL would ignore it
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        cadata = None
        if text := options.get("cadata"):
            cadata = base64.b64decode(text, validate=True)
        context = ssl.create_default_context(
            cafile=options.get("cafile"), capath=folder, cadata=cadata
        )
        if certificate := options.get("certfile"):
            file = certificate
            context.load_cert_chain(certificate, options.get("keyfile"), password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"the certificate, key or CA file '{file}' of --url cannot be used ({reason}); "
            "in ?cafile=, ?certfile= or ?keyfile=, give a PEM file that this user can read"
        ) from None
    if options.get("no_verify_ssl", "0") != "0":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _no_password() -> str:
    raise ValueError(
        "the key has a passphrase, which fluffle cannot ask for; remove the passphrase"
    )


def _parse(url: str) -> URL:
    from yarl import URL

    fault = _fault(url)
    if fault is None:
        with contextlib.suppress(ValueError, TypeError):
            parsed = URL(url)
            _ = parsed.port, parsed.password, parsed.path, display_url(parsed)
            return parsed
        fault = f"it cannot be parsed; {_QUOTE}"
    raise UsageError(f"{_redacted(url)} is not the URL of a broker: {fault}")


def _redacted(url: str) -> str:
    """Return the part of an invalid URL that is safe to show."""
    before, at, after = url.rpartition("@")
    scheme = re.match(r"[a-z]{1,10}://", before, re.IGNORECASE)
    if not at or _CONTROL.search(after):
        return "the value of --url or FLUFFLE_URL"
    return f"'{scheme[0] if scheme else ''}…@{after.partition('?')[0]}'"


def _fault(url: str) -> str | None:
    if not url.startswith(("amqp://", "amqps://")):
        return f"it does not begin with amqp:// or amqps://; {_FORM}"
    rest = url.partition("://")[2]
    end = _AUTHORITY_END.search(rest)
    if _CONTROL.search(url) or "#" in rest or (end and "@" in rest[end.start() :]):
        return f"it contains a special character that is not quoted; {_QUOTE}"
    try:
        split = urlsplit(url)
        hostname, _ = split.hostname, split.port
    except ValueError:
        return f"its host or its port cannot be parsed; {_QUOTE}"
    if not hostname or "," in hostname:
        return f"'{hostname or ''}' is not a host; {_FORM}, and for several nodes, a URL for each"
    if len(unquote(split.path).encode()) > _MAX_VHOST + 1:
        return f"its vhost has more than {_MAX_VHOST} bytes, which AMQP does not allow"
    return _wrong_option(split)


def _wrong_option(split: SplitResult) -> str | None:
    options = parse_qs(split.query, keep_blank_values=True)
    for name, values in options.items():
        if name not in _OPTIONS:
            return f"it has the unknown option ?{name:.40}=; choose from {', '.join(_OPTIONS)}"
        if split.scheme == "amqp" and name in _TLS_OPTIONS:
            return f"its option ?{name}= needs TLS; write amqps://… instead of amqp://…"
        allowed = _VALUES.get(name)
        if "" in values or (allowed and not allowed.issuperset(map(str.lower, values))):
            needs = " or ".join(sorted(allowed)) if allowed else "a value"
            return f"its option ?{name}= needs {needs}"
    if "keyfile" in options and "certfile" not in options:
        return "its option ?keyfile= needs ?certfile= with the certificate of this key"
    return None
