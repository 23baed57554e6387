"""Mapping of aio_pika's exceptions and RabbitMQ's error texts to the transport contract's errors.

A refusal that would happen again is a ``BrokerError``. It names the user, the action, the missing
permission or the limit, and the remedy. Everything else is a ``LinkLost``, after which another link
is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Literal

import aiormq.exceptions
import pamqp.exceptions

from fluffle_common.concurrency import cancelled
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.base import OtherArguments, QueueInUse, UnknownQueueType
from fluffle_common.transport.rabbitmq.urls import without_credentials

# These libraries log what they also raise, and our errors report that.
for _name in ("aio_pika", "aiormq"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

Right = Literal["configure", "read", "write", "bind"]
Error = LinkLost | BrokerError | QueueInUse

# What aio_pika and aiormq raise when a connection or a channel is no longer usable, besides a bare
# RuntimeError (see `is_lost`).
_LOST = (
    aiormq.exceptions.AMQPError,
    aiormq.exceptions.ChannelInvalidStateError,
    pamqp.exceptions.PAMQPException,
    OSError,
    EOFError,
)
_THEIRS = ("aiormq", "aio_pika")

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
_ARGUMENT = re.compile(r"inequivalent arg '(?P<argument>[^']*)' for queue '(?P<name>[^']*)'")
_QUEUE_TYPE = re.compile(
    r"invalid arg 'x-queue-type'|queue.type|of type 'rabbit_\w+_queue'|NOT_IMPLEMENTED"
)

RIGHTS_REMEDY = (
    "'fluffle broker permissions' prints the rights that a worker or a coordinator needs"
)


def is_lost(wrong: BaseException) -> bool:
    """Return whether an exception means that a connection or a channel is no longer usable.

    For a closed connection, aiormq and aio_pika also raise a bare ``RuntimeError``. One that was
    raised outside their code is a bug and does not count.
    """
    if isinstance(wrong, _LOST):
        return True
    if type(wrong) is not RuntimeError:
        return False
    trace = wrong.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module: str = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in _THEIRS


@contextlib.contextmanager
def as_ours(user: str = "", right: Right | None = None) -> Iterator[None]:
    """Raise the contract's errors in place of aio_pika's.

    Args:
        user: the user that is logged in.
        right: the permission that the request needs, for error texts that do not name it.
    """
    try:
        yield
    except asyncio.CancelledError:
        # When a connection closes, aiormq cancels the futures that wait for it. Unless this task
        # itself was cancelled, the exception must not end it, or the program, silently.
        if cancelled():
            raise
        raise LinkLost("the link was closed") from None
    except (*_LOST, RuntimeError) as gone:
        if not is_lost(gone):
            raise
        raise meaning(told(gone), user, right) from None


@contextlib.contextmanager
def declaring() -> Iterator[None]:
    """Raise ``OtherArguments`` or ``UnknownQueueType`` for a refused declaration.

    The reply code alone is not enough: RabbitMQ also uses it when a consumer times out.
    """
    try:
        yield
    except LinkLost as gone:
        text = str(gone)
        if "inequivalent arg" not in text and _QUEUE_TYPE.search(text):
            raise UnknownQueueType(
                f"the broker does not have this type of queue ({text})"
            ) from None
        if "PRECONDITION_FAILED" not in text:
            raise
        raise OtherArguments(_otherwise(text)) from None


def _otherwise(text: str) -> str:
    """Describe a conflict with an existing queue or exchange, and the remedy."""
    found = _ARGUMENT.search(text)
    if found is None or found["argument"] in ("x-queue-type", "type"):
        return (
            f"it already exists on the broker with different arguments ({text}); use the same "
            "--queue-type everywhere, or delete the old queue"
        )
    return (
        f"queue '{found['name']}' was created by another version of fluffle ({text}); stop "
        f"everyone who uses it, delete it with 'rabbitmqctl delete_queue {found['name']}', and "
        "start again"
    )


def meaning(text: str, user: str = "", right: Right | None = None) -> Error:
    """Return the error for a reply text of the broker.

    >>> meaning("ACCESS_REFUSED - queue 'f.inbox.w' in vhost '/' in exclusive use")
    QueueInUse("ACCESS_REFUSED - queue 'f.inbox.w' in vhost '/' in exclusive use")
    >>> str(meaning("ACCESS_REFUSED - access to queue 'f.updates' in vhost '/' refused for user "
    ...     "'w'", "w", "configure")).partition(";")[0]
    "the broker does not let user 'w' configure queue 'f.updates' in vhost '/'"
    """
    who = f"user '{user}'" if user else "this user"
    if _IN_USE.search(text):
        return QueueInUse(text)
    if "ACCESS_REFUSED" in text:
        return BrokerError(f"{_forbidden(text, who, right)}; {RIGHTS_REMEDY}")
    if found := _TOO_LARGE.search(text):
        return BrokerError(
            f"a message of {int(found['size']):,} bytes is above the broker's limit of "
            f"{int(found[2]):,} (max_message_size); raise it in rabbitmq.conf, to 8388608 or more"
        )
    if found := _OTHER_USER.search(text):
        return BrokerError(
            f"messages are sent as {who}, but this connection belongs to user "
            f"'{found['user']}'; put that name into --url amqp://user:password@host"
        )
    if _LIMIT.search(text):
        return BrokerError(
            f"the broker has reached a limit for {who} ({text}); raise or clear it with "
            "'rabbitmqctl set_vhost_limits', 'set_user_limits' or in rabbitmq.conf"
        )
    return LinkLost(text)


def _forbidden(text: str, who: str, right: Right | None) -> str:
    """Name the user and the permission that is missing."""
    if found := _TOPIC.search(text):
        return (
            f"the broker does not let {who} {right or 'write'} the routing key '{found['key']}' in "
            f"exchange '{found['name']}' (a topic permission)"
        )
    if found := _ACCESS.search(text):
        name, what = found["name"], found["what"]
        # Binding needs write on the queue and read on the exchange. Without a known right, the
        # request was to get from a queue or to publish to an exchange.
        usual = ("write", "read") if right == "bind" else ("read", "write")
        usual_right = usual[0] if what == "queue" else usual[1]
        asked = found["right"] or (
            right if right in ("configure", "read", "write") else usual_right
        )
        vhost = f" in vhost '{found['vhost']}'" if found["vhost"] is not None else ""
        return f"the broker does not let {who} {asked} {what} '{name}'{vhost}"
    return f"the broker refuses {who} ({text})"


def told(wrong: BaseException) -> str:
    """Return the text of an exception in one line, without credentials."""
    text = " ".join(str(part) for part in wrong.args) or str(wrong)
    return without_credentials(" ".join(text.split())) or type(wrong).__name__
