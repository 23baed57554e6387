"""A link for a single command, which does not reconnect."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.base import AccessRefused, Link, QueueInUse, Transport


@contextlib.asynccontextmanager
async def open_once(transport: Transport) -> AsyncGenerator[Link]:
    """Open a link for a ``with`` block; its refusals, failures and loss are ``BrokerError``."""
    try:
        link = await transport.open()
    except LinkLost as error:
        raise BrokerError(
            f"no broker at {transport.address} ({error}); start one with 'fluffle broker up' or "
            "give its URL with --url"
        ) from None
    try:
        with explain_refusals():
            yield link
    except LinkLost as error:
        raise BrokerError(
            f"the connection to the broker at {transport.address} was lost ({error}); try again"
        ) from None
    finally:
        await link.close()


@contextlib.contextmanager
def explain_refusals() -> Iterator[None]:
    """Raise a ``BrokerError`` for what the broker refuses to a command that inspects."""
    try:
        yield
    except AccessRefused as error:  # such commands declare, bind and read what is not theirs
        raise BrokerError(
            f"{error.lacking}; in --url, give a user with all permissions in the vhost"
        ) from None
    except QueueInUse as error:
        raise BrokerError(
            f"a queue is in exclusive use by another connection ({error}); try again later"
        ) from None
