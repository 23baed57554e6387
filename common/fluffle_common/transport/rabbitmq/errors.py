"""Mapping of aio_pika's exceptions and RabbitMQ's error texts to the transport contract's errors.

A refusal that would happen again is a ``BrokerError``. It names the user, the action, the missing
permission or the limit, and the remedy. Everything else is a ``LinkLost``, after which another link
is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Literal

import aiormq.exceptions
import pamqp.exceptions

from fluffle_common.concurrency import cancelled
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.base import (
    AccessRefused,
    OtherArguments,
    QueueInUse,
    UnknownQueueType,
)
from fluffle_common.transport.rabbitmq.urls import without_credentials

# These libraries log what they also raise, and our errors report that.
for _name in ("aio_pika", "aiormq"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

Right = Literal["configure", "read", "write", "bind"]
TransportError = LinkLost | BrokerError | QueueInUse

# What aio_pika and aiormq raise when a connection or a channel is no longer usable, besides
# `_BARE_ERRORS`, which anyone may raise (see `is_connection_error`).
_CONNECTION_ERRORS = (
    aiormq.exceptions.AMQPError,
    aiormq.exceptions.ChannelInvalidStateError,
    pamqp.exceptions.PAMQPException,
    OSError,
    EOFError,
)
# What asyncio says about an address, in place of the system's words.
_ASYNCIO = re.compile(r"(\d+)\]? Connect call failed \(")
_BARE_ERRORS = (Exception, RuntimeError, StopAsyncIteration)
_LIBRARIES = ("aiormq", "aio_pika")

_IN_USE = re.compile(r"in exclusive use|RESOURCE_LOCKED", re.IGNORECASE)
_TOPIC = re.compile(r"access to topic '(?P<key>[^']*)' in exchange '(?P<name>[^']*)'")
_ACCESS = re.compile(
    r"(?:(?P<right>configure|read|write) )?access to (?P<what>queue|exchange) '(?P<name>[^']*)'"
    r"(?: in vhost '(?P<vhost>[^']*)')?"
)
_LIMIT = re.compile(r"limit\b.*\breached|has reached the negotiated channel_max")
_TOO_LARGE = re.compile(r"message size (?P<size>\d+) is larger than (?:configured )?max size (\d+)")
_OTHER_USER = re.compile(
    r"user_id property set to '[^']*' but authenticated user was '(?P<user>[^']*)'"
)
_ARGUMENT = re.compile(
    r"inequivalent arg '(?P<argument>[^']*)' for (?P<what>queue|exchange) '(?P<name>[^']*)'"
)
_QUEUE_TYPE = re.compile(
    r"invalid arg 'x-queue-type'|queue.type|of type 'rabbit_\w+_queue'|NOT_IMPLEMENTED"
)


def is_connection_error(error: BaseException) -> bool:
    """Return whether an exception means that a connection or a channel is no longer usable.

    For a closed connection, aiormq and aio_pika also raise a bare ``RuntimeError``, a bare
    ``Exception`` or, during the handshake, ``StopAsyncIteration``. One that was raised outside
    their code is a bug and does not count.
    """
    if isinstance(error, _CONNECTION_ERRORS):
        return True
    if type(error) not in _BARE_ERRORS:
        return False
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module: str = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in _LIBRARIES


@contextlib.contextmanager
def map_exceptions(user: str = "", right: Right | None = None) -> Iterator[None]:
    """Raise the contract's errors in place of aio_pika's.

    ``right`` is the permission that the request needs, for error texts that do not name it.
    """
    try:
        yield
    except asyncio.CancelledError:
        # When a connection closes, aiormq cancels the futures that wait for it. Unless this task
        # itself was cancelled, the exception must not end it, or the program, silently.
        if cancelled():
            raise
        raise LinkLost("the connection was closed") from None
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise error_for_reply(error_text(error), user, right) from None


@contextlib.contextmanager
def map_declare_errors() -> Iterator[None]:
    """Raise ``OtherArguments`` or ``UnknownQueueType`` for a refused declaration.

    The reply code alone is not enough: RabbitMQ also uses it when a consumer times out.
    """
    try:
        yield
    except LinkLost as error:
        text = str(error)
        if "inequivalent arg" not in text and _QUEUE_TYPE.search(text):
            raise UnknownQueueType(
                f"the broker does not support this type of queue ({text}); choose another "
                "--queue-type"
            ) from None
        if "PRECONDITION_FAILED" not in text:
            raise
        raise OtherArguments(_conflict(text)) from None


def _conflict(text: str) -> str:
    """Describe a conflict with an existing queue or exchange, and the remedy."""
    match = _ARGUMENT.search(text)
    entity = f"{match['what']} '{match['name']}'" if match else "a queue"
    if match is None or match["argument"] == "x-queue-type":
        remedy = (
            "use the same --queue-type for the coordinator and all workers, or delete the "
            "federation's old queues"
        )
    elif match["what"] == "exchange":
        remedy = "delete the exchange on RabbitMQ's management page, or choose another --federation"
    else:
        remedy = (
            "another version of fluffle may have created it; stop the coordinator and the workers, "
            f"delete the queue with 'rabbitmqctl delete_queue {match['name']}', and start again"
        )
    return f"{entity} already exists with different arguments ({text}); {remedy}"


def closing_error(why: BaseException, user: str = "") -> BrokerError | LinkLost:
    """Return the contract's error for the exception that a connection or channel closed with."""
    if isinstance(why, asyncio.CancelledError):  # aiormq missed the broker's heartbeats
        return LinkLost("the broker does not answer")
    text = error_text(why)
    error = error_for_reply(text, user)
    return error if isinstance(error, BrokerError) else LinkLost(text)


def error_for_reply(text: str, user: str = "", right: Right | None = None) -> TransportError:
    """Return the error for a reply text of the broker.

    >>> error_for_reply("ACCESS_REFUSED - queue 'f.inbox.w' in vhost '/' in exclusive use")
    QueueInUse("ACCESS_REFUSED - queue 'f.inbox.w' in vhost '/' in exclusive use")
    >>> refusal = "ACCESS_REFUSED - access to queue 'f.updates' in vhost '/' refused for user 'w'"
    >>> str(error_for_reply(refusal, "w", "configure")).partition(";")[0]
    "the broker does not let user 'w' configure queue 'f.updates' in vhost '/'"
    """
    who = f"user '{user}'" if user else "this user"
    if _IN_USE.search(text):
        return QueueInUse(text)
    if "ACCESS_REFUSED" in text:
        return AccessRefused(_missing_permission(text, who, right))
    if match := _TOO_LARGE.search(text):
        return BrokerError(
            f"a message of {int(match['size']):,} bytes exceeds the broker's limit of "
            f"{int(match[2]):,} bytes; raise max_message_size in rabbitmq.conf to 8388608 or more"
        )
    if match := _OTHER_USER.search(text):
        return BrokerError(
            f"this process sends messages as {who}, but is logged in as user '{match['user']}'; "
            f"in --url, give the user '{match['user']}', also with ?auth=external"
        )
    if _LIMIT.search(text):
        return BrokerError(
            f"the broker has reached a limit for {who} ({text}); raise or clear this limit in "
            "rabbitmq.conf, or with 'rabbitmqctl set_vhost_limits' or 'set_user_limits'"
        )
    return LinkLost(text)


def _missing_permission(text: str, who: str, right: Right | None) -> str:
    """Name the user and the permission that is missing."""
    if match := _TOPIC.search(text):
        return (
            f"the broker does not let {who} {right or 'write'} the routing key '{match['key']}' in "
            f"exchange '{match['name']}' (a missing topic permission)"
        )
    if match := _ACCESS.search(text):
        name, entity = match["name"], match["what"]
        # Without a known right, the request was to get from a queue or to publish to an exchange.
        implied = {
            "bind": {"queue": "write", "exchange": "read"},
            None: {"queue": "read", "exchange": "write"},
        }
        needed = match["right"] or (implied[right][entity] if right in implied else right)
        vhost = f" in vhost '{match['vhost']}'" if match["vhost"] is not None else ""
        return f"the broker does not let {who} {needed} {entity} '{name}'{vhost}"
    return f"the broker denies {who} access ({text})"


def error_text(error: BaseException) -> str:
    """Return the text of an exception in one line, without credentials."""
    text = " ".join(str(part) for part in error.args) or str(error)
    if refused := _ASYNCIO.findall(text):  # for each address of the host
        return ", ".join(
            f"{number} {os.strerror(int(number))}" for number in dict.fromkeys(refused)
        )
    if not text and type(error) in _BARE_ERRORS:
        return "the connection was closed"
    return without_credentials(" ".join(text.split())) or type(error).__name__
