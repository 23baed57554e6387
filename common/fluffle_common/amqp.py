"""RabbitMQ behind the transport contract: the only file that knows aio_pika.

A link is two connections, one to publish and one to consume, because a large message under way in
one direction delays acknowledgements and heartbeats behind it. aio_pika's ``connect_robust`` is not
used: what it repairs by itself (consumers, prefetch, queues) it repairs without a word to the
layers above, and those have to know, since everything unacknowledged comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
import pamqp.exceptions
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

from fluffle_common.errors import BrokerError, LinkLost, UsageError
from fluffle_common.topology import Binding, Entity, Exchange, Queue
from fluffle_common.transport import (
    Counts,
    Delivery,
    Full,
    HeaderValue,
    Link,
    Occupied,
    Properties,
    Transport,
    Unroutable,
)

if TYPE_CHECKING:
    from yarl import URL

# They log what they also raise; whoever catches it says it in our own words.
for _name in ("aio_pika", "aiormq"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

_CONNECT_TIMEOUT_S = 15.0
_CLOSE_TIMEOUT_S = 2.0
# Silence of this length on a connection means that the other side is gone; both sides look twice
# in this time.
_HEARTBEAT_S = 20

# What aio_pika and aiormq raise when a connection or channel is no longer usable.
_LOST = (
    aiormq.exceptions.AMQPError,
    RuntimeError,  # of a closed channel it is a ChannelInvalidStateError, of a connection just this
    pamqp.exceptions.PAMQPException,
    ConnectionError,
    OSError,
    EOFError,
)


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """Map foreign exceptions to the contract's, in one place."""
    try:
        yield
    except asyncio.CancelledError:
        if _cancelled():
            raise
        raise LinkLost("the link was closed") from None
    except aiormq.exceptions.PublishError as returned:
        raise Unroutable(f"no queue is bound for it: {returned}") from None
    except aiormq.exceptions.DeliveryError as refused:
        raise Full(f"the broker refused it: {refused}") from None
    except (aiormq.exceptions.ChannelAccessRefused, aiormq.exceptions.ChannelLockedResource) as no:
        raise Occupied(_told(no)) from None
    except _LOST as gone:
        raise LinkLost(_told(gone)) from None


@contextlib.contextmanager
def _declaring() -> Iterator[None]:
    """Tell what is declared otherwise; elsewhere, the same code means a consumer's time-out."""
    try:
        yield
    except aiormq.exceptions.ChannelPreconditionFailed as no:
        raise BrokerError(
            f"the broker has it with other settings ({_told(no)}); use the same --queue-type "
            "everywhere, or delete the old queue"
        ) from None


def _cancelled() -> bool:
    """Whether it is us who are cancelled.

    Closing a connection of aiormq raises ``CancelledError`` in whoever waits for something of it,
    which taken for the real thing would end a task, or the program, without a word.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _told(wrong: BaseException) -> str:
    text = " ".join(str(part) for part in wrong.args) or str(wrong)
    return text.strip() or type(wrong).__name__


class AmqpDelivery:
    """See ``transport.Delivery``."""

    def __init__(self, message: AbstractIncomingMessage) -> None:
        self.body = message.body
        self.redelivered = bool(message.redelivered)
        self.properties = Properties(
            type=message.type or "",
            message_id=message.message_id or "",
            headers=_readable(message.headers),
            durable=message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT,
            user=message.user_id,
        )
        # Not the message itself: whoever is done with ``body`` can let go of it before the ack.
        self._channel, self._tag = message.channel, message.delivery_tag

    async def ack(self) -> None:
        """See ``transport.Delivery``."""
        with contextlib.suppress(LinkLost), _as_ours():
            await self._channel.basic_ack(self._tag or 0)

    async def release(self) -> None:
        """See ``transport.Delivery``."""
        with contextlib.suppress(LinkLost), _as_ours():
            await self._channel.basic_nack(self._tag or 0, requeue=True)


def _readable(headers: Any) -> dict[str, HeaderValue]:
    return {k: v for k, v in (headers or {}).items() if isinstance(v, str | int | float | bool)}


class AmqpLink(Link):
    """See ``transport.Link``."""

    def __init__(
        self, publishing: AbstractConnection, consuming: AbstractConnection, user: str
    ) -> None:
        self._connections = (publishing, consuming)
        self._user = user
        self._gone = asyncio.Event()
        self._why = "the link was closed"
        self._readers: set[asyncio.Queue[AbstractIncomingMessage | None]] = set()
        self._publish: AbstractChannel
        self._get: AbstractChannel

    async def start(self) -> AmqpLink:
        """Open the channels."""
        for connection in self._connections:
            connection.close_callbacks.add(self._lose)
        publishing, consuming = self._connections
        with _as_ours():
            self._publish = publishing.channel(publisher_confirms=True, on_return_raises=True)
            self._get = consuming.channel(publisher_confirms=False)
            for channel in (self._publish, self._get):
                await channel.initialize()
                channel.close_callbacks.add(self._lose)
        return self

    def _lose(self, _: Any, why: BaseException | None = None) -> None:
        if not self._gone.is_set():
            self._why = _told(why) if why else self._why
            self._end()

    def _end(self) -> None:
        self._gone.set()
        for arrived in self._readers:
            arrived.put_nowait(None)  # whoever waits there sees that it is over

    def _check(self) -> None:
        if self._gone.is_set():
            raise LinkLost(self._why)

    async def declare(self, entities: Iterable[Entity]) -> None:
        """See ``transport.Link``."""
        self._check()
        with _as_ours(), _declaring():
            channel = await self._get.get_underlay_channel()
            for entity in entities:
                match entity:
                    case Exchange(name, kind, alternate):
                        await channel.exchange_declare(
                            name,
                            exchange_type=kind,
                            durable=True,
                            arguments={"alternate-exchange": alternate} if alternate else None,
                        )
                    case Queue(name, _, arguments):
                        await channel.queue_declare(name, durable=True, arguments={**arguments})
                    case Binding(queue, exchange, key):
                        await channel.queue_bind(queue, exchange, key)

    async def publish(
        self, body: bytes, properties: Properties, *, exchange: str, keys: Sequence[str]
    ) -> None:
        """See ``transport.Link``."""
        self._check()
        first, *rest = keys
        headers: dict[str, Any] = dict(properties.headers)
        if rest:
            headers["CC"] = rest
        message = aio_pika.Message(
            body,
            content_type="application/msgpack",
            type=properties.type,
            message_id=properties.message_id or None,
            headers=headers,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT
            if properties.durable
            else aio_pika.DeliveryMode.NOT_PERSISTENT,
            timestamp=datetime.now(UTC),
            user_id=self._user,
        )
        with _as_ours():
            channel = await self._publish.get_underlay_channel()
            await channel.basic_publish(
                body,
                exchange=exchange,
                routing_key=first,
                properties=message.properties,
                mandatory=True,
            )

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        """See ``transport.Link``."""
        self._check()
        arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        with _as_ours():
            channel = self._connections[1].channel(publisher_confirms=False)
            # A refusal closes the channel, which must not take the link with it: so the channel
            # counts as part of the link only from here on.
            await channel.initialize()
            await channel.set_qos(prefetch_count=prefetch)
            source = await channel.get_queue(queue, ensure=False)
            await source.consume(arrived.put, exclusive=exclusive)
            underlay = await channel.get_underlay_channel()
        channel.close_callbacks.add(self._lose)
        underlay.on_consumer_cancel_callbacks.add(self._cancelled)  # the queue was deleted
        self._readers.add(arrived)
        return self._deliveries(arrived, channel)

    async def _deliveries(
        self, arrived: asyncio.Queue[AbstractIncomingMessage | None], channel: AbstractChannel
    ) -> AsyncGenerator[Delivery]:
        try:
            while True:
                self._check()
                message = await arrived.get()
                if message is not None:
                    self._check()
                    yield AmqpDelivery(message)
        finally:
            self._readers.discard(arrived)
            if not self._gone.is_set():
                channel.close_callbacks.discard(self._lose)
                with contextlib.suppress(LinkLost, TimeoutError), _as_ours():
                    await asyncio.wait_for(channel.close(), _CLOSE_TIMEOUT_S)

    def _cancelled(self, *_: Any) -> None:
        self._lose(None, LinkLost("a queue we read from was deleted"))

    async def get(self, queue: str) -> Delivery | None:
        """See ``transport.Link``."""
        self._check()
        with _as_ours():
            source = await self._get.get_queue(queue, ensure=False)
            message = await source.get(fail=False)
        return AmqpDelivery(message) if message is not None else None

    async def counts(self, queue: str) -> Counts | None:
        """See ``transport.Link``."""
        self._check()
        with _as_ours():
            # A queue that is not there closes the channel that asks, so that one is not shared.
            channel = self._connections[1].channel(publisher_confirms=False)
            await channel.initialize()
            underlay = await channel.get_underlay_channel()
            try:
                told = await underlay.queue_declare(queue, passive=True)
            except aiormq.exceptions.ChannelNotFoundEntity:
                return None
            await channel.close()
        return Counts(int(told.message_count or 0), int(told.consumer_count or 0))

    async def purge(self, queue: str) -> int:
        """See ``transport.Link``."""
        self._check()
        with _as_ours():
            channel = await self._get.get_underlay_channel()
            return int((await channel.queue_purge(queue)).message_count or 0)

    async def lost(self) -> None:
        """See ``transport.Link``."""
        await self._gone.wait()

    async def close(self) -> None:
        """See ``transport.Link``."""
        self._end()
        # Side by side: each may wait in vain for an answer, and nobody reconnects before that.
        await asyncio.gather(*(_close(connection) for connection in self._connections))


async def _close(connection: AbstractConnection) -> None:
    with contextlib.suppress(LinkLost), _as_ours():
        await asyncio.wait_for(connection.close(), _CLOSE_TIMEOUT_S)


class AmqpTransport(Transport):
    """Links to the RabbitMQ at a URL.

    Args:
        url: ``amqp://user:password@host:port/vhost`` or ``amqps://…``.
        name: how the connections show in RabbitMQ's own pages.

    Raises:
        UsageError: where the URL is not one.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = parse_url(url)
        self._name = name

    @property
    def address(self) -> str:
        """See ``transport.Transport``."""
        return str(self._url.with_password(None).with_user(None).with_query(None))

    async def open(self) -> Link:
        """See ``transport.Transport``."""
        opened: list[AbstractConnection] = []
        try:
            for use in ("publish", "consume"):
                opened.append(await self._connect(f"{self._name} ({use})"))
            return await AmqpLink(opened[0], opened[1], self._url.user or "guest").start()
        except BaseException:
            for connection in opened:
                await _close(connection)
            raise

    async def _connect(self, name: str) -> AbstractConnection:
        try:
            return await aio_pika.connect(
                self._url.update_query(heartbeat=_HEARTBEAT_S),
                client_properties={"connection_name": name},
                timeout=_CONNECT_TIMEOUT_S,
            )
        except (
            aiormq.exceptions.AuthenticationError,
            aiormq.exceptions.ProbableAuthenticationError,
        ):
            raise BrokerError(
                f"the broker at {self.address} refuses user '{self._url.user}' or the password; "
                "put the right ones into --url amqp://user:password@host"
            ) from None
        except aiormq.exceptions.ConnectionNotAllowed as no:
            raise BrokerError(
                f"the broker at {self.address} does not let us in ({_told(no)}); "
                "check the vhost in --url and the user's permissions"
            ) from None
        except aiormq.exceptions.InvalidFrameError as no:
            # What aiormq makes of a broker that closes the connection instead of opening the vhost.
            if "Connection.Close" not in _told(no):
                raise LinkLost(_told(no)) from None
            raise BrokerError(
                f"the broker at {self.address} does not let user '{self._url.user}' into this "
                "vhost, or has none of that name; check the vhost in --url and the permissions"
            ) from None
        except asyncio.CancelledError:
            if _cancelled():
                raise
            raise LinkLost("the connection was closed while it was opened") from None
        except TimeoutError:
            raise LinkLost(f"no answer within {_CONNECT_TIMEOUT_S:.0f} s") from None
        except _LOST as gone:
            raise LinkLost(_told(gone)) from None


def parse_url(url: str) -> URL:
    """Check a broker's URL.

    Raises:
        UsageError: saying what is wrong with it.
    """
    from yarl import URL

    try:
        split = urlsplit(url)
        if split.scheme not in ("amqp", "amqps"):
            raise ValueError(f"it starts with '{split.scheme}://'" if split.scheme else "no scheme")
        if not split.hostname:
            raise ValueError("no host")
        _ = split.port  # raises where it is not a number
        return URL(url)
    except ValueError as wrong:
        raise UsageError(
            f"'{url}' is not the URL of a broker ({wrong}); "
            "write amqp://user:password@host:port/vhost or amqps://…"
        ) from None
