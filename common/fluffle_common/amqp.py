"""RabbitMQ behind the transport contract; with its ``amqp_…`` siblings all that knows aio_pika."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiormq.exceptions

from fluffle_common.amqp_connection import Connection, connect
from fluffle_common.amqp_errors import LOST, told
from fluffle_common.amqp_link import AmqpLink, close
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport import Link, Transport, cancelled
from fluffle_common.urls import parse_urls, shown

if TYPE_CHECKING:
    from yarl import URL

_CONNECT_TIMEOUT_S = 15.0
# Silence of this length on a connection means that the other side is gone; both sides look twice
# in this time.
_HEARTBEAT_S = 20


class AmqpTransport(Transport):
    """Links to a RabbitMQ, or to whichever node of a cluster can be reached.

    Args:
        url: ``amqp://user:password@host:port/vhost`` or ``amqps://…``; of a cluster as many of
            these as there are nodes, comma-separated. The first that can be reached is used, and
            after that the one in use before the others.
        name: how the connections show in RabbitMQ's own pages.

    Raises:
        UsageError: where the URL is not one.
    """

    def __init__(self, url: str, name: str) -> None:
        self._urls = parse_urls(url)
        self._name = name
        self._use(None)

    @property
    def address(self) -> str:
        """See ``transport.Transport``: of the node in use, or of all while none can be reached."""
        return self._shown

    async def open(self) -> Link:
        """See ``transport.Transport``."""
        missed = []
        for url in sorted(self._urls, key=lambda url: url != self._used):
            try:
                link = await self._open(url)
            except LinkLost as why:
                missed.append(f"{shown(url)}: {why}" if len(self._urls) > 1 else str(why))
            else:
                self._use(url)
                return link
        self._use(None)
        raise LinkLost("; ".join(missed))

    def _use(self, url: URL | None) -> None:
        self._used = url
        self._shown = ", ".join(map(shown, [url] if url else self._urls))

    async def _open(self, url: URL) -> Link:
        opened: list[Connection] = []
        try:
            for use in ("publish", "consume"):
                opened.append(await _connect(url, f"{self._name} ({use})"))
            return await AmqpLink(opened[0], opened[1], url.user or "guest").start()
        except BaseException:
            for connection in opened:
                await close(connection)
            raise


async def _connect(url: URL, name: str) -> Connection:
    try:
        heartbeat = url.update_query(heartbeat=_HEARTBEAT_S)
        return await connect(heartbeat, name, _CONNECT_TIMEOUT_S)
    except (
        aiormq.exceptions.AuthenticationError,
        aiormq.exceptions.ProbableAuthenticationError,
    ):
        raise BrokerError(
            f"the broker at {shown(url)} refuses user '{url.user}' or the password; "
            "put the right ones into --url amqp://user:password@host"
        ) from None
    except aiormq.exceptions.ConnectionNotAllowed as no:
        raise BrokerError(
            f"the broker at {shown(url)} does not let us in ({told(no)}); "
            "check the vhost in --url and the user's permissions"
        ) from None
    except aiormq.exceptions.InvalidFrameError as no:
        # What aiormq makes of a broker that closes the connection instead of opening the vhost.
        if "Connection.Close" not in told(no):
            raise LinkLost(told(no)) from None
        raise BrokerError(
            f"the broker at {shown(url)} does not let user '{url.user}' into this "
            "vhost, or has none of that name; check the vhost in --url and the permissions"
        ) from None
    except asyncio.CancelledError:
        if cancelled():
            raise
        raise LinkLost("the connection was closed while it was opened") from None
    except TimeoutError:
        raise LinkLost(f"no answer within {_CONNECT_TIMEOUT_S:.0f} s") from None
    except LOST as gone:
        raise LinkLost(told(gone)) from None
