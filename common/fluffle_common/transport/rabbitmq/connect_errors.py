"""Errors of a connection attempt, and whether another attempt can succeed."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

from aiormq.exceptions import AuthenticationError

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.rabbitmq.urls import display_url

if TYPE_CHECKING:
    from yarl import URL

_ACCESS_REFUSED, _NOT_ALLOWED = 403, 530
_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_PROBE_S = 3.0

_GIVE_CERTIFICATE = (
    "give a certificate that the broker trusts in --url, as in "
    "amqps://…?certfile=/path/cert.pem&keyfile=/path/key.pem"
)
# Words in OpenSSL's reasons, what they mean, and the remedy.
_TLS_FAULTS = (
    (
        ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED"),
        "does not accept this client's certificate",
        _GIVE_CERTIFICATE,
    ),
    (
        ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"),
        "does not use TLS on this port",
        "use amqp://… in --url, or give the port of the broker's TLS listener (usually 5671)",
    ),
    (  # with TLS 1.2, a missing certificate is only a HANDSHAKE_FAILURE
        ("HANDSHAKE_FAILURE", "PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER"),
        "refuses the TLS handshake",
        f"{_GIVE_CERTIFICATE}, if it requires one, or allow TLS 1.2 or 1.3 on the broker",
    ),
)


class WrongNode(BrokerError):
    """This node cannot be used with this URL; another node of its cluster may work."""


def handshake_error(
    code: int, text: str, url: URL, *, was_connected: bool
) -> BrokerError | LinkLost:
    """Return the error for a broker that closed a connection during the handshake.

    ``code`` and ``text`` are the broker's. If this process was connected before, a reached limit is
    temporary: the broker may still count connections that the network has cut.
    """
    where, user, vhost = display_url(url), url.user or "guest", url.path[1:] or "/"
    if code == _ACCESS_REFUSED and url.query.get("auth") == "external":
        return BrokerError(
            f"the broker at {where} has no user for this client certificate; add a user with the "
            "name in the certificate, or give another ?certfile= in --url"
        )
    if code == _ACCESS_REFUSED:
        note = " ('guest' may connect only from the broker's machine)" if user == "guest" else ""
        return BrokerError(
            f"the broker at {where} rejects user '{user}' or the password{note}; correct the user "
            "and the password in --url amqp://user:password@host"
        )
    if code != _NOT_ALLOWED:  # for example, it is starting or stopping
        return LinkLost(text)
    if "limit" in text:
        if was_connected:
            return LinkLost(text)
        return BrokerError(
            f"the broker at {where} rejects a connection of user '{user}' ({text}); raise the "
            "limit with 'rabbitmqctl set_vhost_limits' or 'set_user_limits', because each fluffle "
            "process has 2 connections"
        )
    if "not found" in text:
        return BrokerError(
            f"the broker at {where} has no vhost '{vhost}'; create the vhost with "
            "'rabbitmqctl add_vhost', or correct the vhost at the end of --url"
        )
    return BrokerError(
        f"the broker at {where} denies user '{user}' access to vhost '{vhost}' ({text}); correct "
        "the vhost in --url, or grant the permissions that 'fluffle broker permissions' prints"
    )


def mechanism_error(error: BaseException, url: URL) -> WrongNode | None:
    """Return the error for a broker without the login that the URL asks for; None for others."""
    if not isinstance(error, AuthenticationError):
        return None
    offered, auth = str(error.args[0] if error.args else ""), url.query.get("auth", "plain")
    return WrongNode(
        f"the broker at {display_url(url)} does not offer the login mechanism {auth.upper()} (it "
        f"offers {offered or 'none'}); in --url, write ?auth=plain or ?auth=external, or enable "
        "the mechanism on the broker"
    )


def tls_error(error: BaseException, url: URL) -> WrongNode | None:
    """Return the error for a failed TLS handshake; None if TLS was not the cause."""
    cause = _ssl_error(error)
    if cause is None:
        return None
    where = display_url(url)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return WrongNode(
            f"the certificate of the broker at {where} cannot be verified "
            f"({cause.verify_message.rstrip('.')}); renew the certificate, use its host name in "
            "--url, or give the file of its CA there, as in amqps://…?cafile=/path/ca.pem"
        )
    reason = (cause.reason or str(cause)).upper().replace(" ", "_")
    for words, fault, remedy in _TLS_FAULTS:
        if any(word in reason for word in words):
            return WrongNode(f"the broker at {where} {fault} ({reason}); {remedy}")
    return None


def probe_tls_error(url: URL, context: ssl.SSLContext | None) -> WrongNode | None:
    """Return the error if TLS is why a broker closed a connection silently; None otherwise.

    asyncio hides the TLS alerts that arrive after the handshake, so this connects again with a
    plain socket. It blocks for a few seconds at most.

    Without a TLS ``context``, the question is whether the broker requires TLS.
    """
    probe_context = context
    if probe_context is None:
        probe_context = ssl.create_default_context()
        probe_context.check_hostname, probe_context.verify_mode = False, ssl.CERT_NONE
    host, port = url.host or "", url.port or (5671 if url.scheme == "amqps" else 5672)
    only_tls = WrongNode(
        f"the broker at {display_url(url)} accepts only TLS connections; use amqps://… in --url"
    )
    try:
        with (
            socket.create_connection((host, port), _PROBE_S) as plain,
            probe_context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            if context is None:
                return only_tls
            secure.sendall(_PROTOCOL_HEADER)
            secure.recv(1)
    except ssl.SSLError as error:
        if context is not None:
            return tls_error(error, url)
        return only_tls if "ALERT" in (error.reason or "") else None
    except OSError:
        return None
    return None


def _ssl_error(error: BaseException | None) -> ssl.SSLError | None:
    """Return the TLS error in a chain of exceptions, which aiormq may have wrapped."""
    visited: set[int] = set()  # aiormq's errors can be each other's cause
    while error is not None and id(error) not in visited:
        if isinstance(error, ssl.SSLError):
            return error
        visited.add(id(error))
        error = error.__cause__ or error.__context__
    return None
