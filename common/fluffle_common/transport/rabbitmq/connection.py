"""Connections whose message traffic bypasses aiormq, so that bodies are not copied.

aiormq's ``TransportFactory`` lets us open the socket. ``Incoming`` splits the bytes that arrive
there into AMQP frames. Frames that carry or settle a message go to the ``ContentChannel`` of their
channel, which assembles each body in its final buffer. All other frames go to aiormq, which keeps
the handshake, channels, declarations, heartbeats and closing. This relies on AMQP's framing
(AMQP 0-9-1, section 4.2) and on no internals of aiormq.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any

import aio_pika
import numpy as np
from aio_pika.abc import AbstractChannel, ConnectionParameter
from aiormq.connection import TransportFactory
from yarl import URL

from fluffle_common.transport.base import Blocking
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import LARGE_BYTES, Arrived, Content, ContentChannel
from fluffle_common.transport.rabbitmq.confirms import queued_bytes

_READ_AHEAD_BYTES = 2**20
_DEFAULT_FRAME_MAX = 131072
# aiormq closes a connection on which it sees no frame for a minute. It does not see message frames,
# so while they arrive it is given a heartbeat at this interval.
_SHOW_LIFE_S = 5.0
_FRAME_HEAD, _read_head = frames.FRAME.size, frames.FRAME.unpack_from
_BODY, _END_BYTE = frames.BODY, frames.END_BYTE
_NO_END = "an AMQP frame does not end with its frame-end byte"
_WITH_CONTENT = frozenset((frames.DELIVER, frames.GET_OK, frames.RETURN))
_BLOCKING = frozenset((frames.BLOCKED, frames.UNBLOCKED))
_TLS_ALERT = b"\x15\x03"
_KINDS = frozenset((frames.METHOD, frames.HEADER, frames.BODY, frames.HEARTBEAT))


class _Coming:
    """A message that is being received; ``left`` bytes of its body are still missing."""

    __slots__ = ("body", "header", "left", "method", "of")

    def __init__(self, of: ContentChannel, method: bytes) -> None:
        self.of, self.method = of, method
        self.header = b""
        self.body = memoryview(b"")
        self.left = 0

    def begin(self, header: bytes) -> None:
        self.header = header
        self.left = frames.body_size(header)
        # Not zeroed, because all of it is overwritten.
        self.body = np.empty(self.left, np.uint8).data

    def content(self) -> Content:
        large = len(self.body) >= LARGE_BYTES  # larger bodies are not copied
        body = self.body.toreadonly() if large else bytes(self.body)
        return Content(self.method, self.header, body)


class Incoming:
    """Splits received bytes into frames for content channels and frames for aiormq.

    Args:
        feed: called with whole frames for aiormq, in order.
        clock: a monotonic clock, in seconds.
        blocked: called with the reason when the broker blocks publishers, and with None when it
            unblocks them.
    """

    def __init__(
        self,
        feed: Callable[[bytes], object],
        clock: Callable[[], float] = time.monotonic,
        blocked: Callable[[str | None], object] = lambda _: None,
    ) -> None:
        self._feed, self._clock, self._blocked = feed, clock, blocked
        self._fed_at = clock()
        self._contents: dict[int, ContentChannel] = {}  # by channel
        self._coming: dict[int, _Coming] = {}  # by channel
        self._rest = b""  # the beginning of an incomplete frame
        self._into: _Coming | None = None  # the message whose body frame is incomplete
        self._left = 0  # missing bytes of that frame, its end byte included
        self.come_bytes = 0  # total size of the received bodies
        self._foreign = False  # not AMQP 0-9-1; aiormq reports what is wrong
        self.heard = False  # whether anything was received
        self.tls_alert = False  # whether the first bytes were a TLS alert
        self.closed: tuple[int, str] | None = None  # code and text of connection.close

    def hand_to(self, contents: ContentChannel) -> None:
        """Pass the messages of a channel to ``contents`` from now on."""
        self._contents[contents.number] = contents
        self._coming.pop(contents.number, None)

    def received(self, data: bytes) -> None:
        """Handle received bytes, which may begin and end anywhere in a frame.

        Raises:
            ConnectionError: if the bytes are not well-formed frames.
        """
        if not self.heard:
            self.heard, self.tls_alert = True, data.startswith(_TLS_ALERT)
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, end, fed = 0, len(data), False
        if self._into is not None:
            at = self._fill(self._into, data, at)
        while (start := at + _FRAME_HEAD) <= end:
            kind, channel, size = _read_head(data, at)
            if kind not in _KINDS or self._foreign:
                self._foreign = True
                self._feed(data[at:])
                return
            if kind == _BODY and channel in self._coming:
                self._into, self._left = self._coming[channel], size + 1
                at = self._fill(self._into, data, start)
                continue
            stop = start + size
            if stop >= end:
                break
            if data[stop] != _END_BYTE:
                raise ConnectionError(_NO_END)
            if not self._take(kind, channel, data[start:stop]):
                self._feed(data[at : stop + 1])
                fed = True
            at = stop + 1
        self._rest = data[at:]
        self._show_life(fed)

    def _fill(self, coming: _Coming, data: bytes, at: int) -> int:
        """Copy the bytes of a body frame into its body; return the position after them."""
        stop = at + self._left - 1  # the position of the end byte
        end = len(data)
        whole = stop < end
        if not whole:
            stop = end
        count = stop - at
        if count > coming.left:
            raise ConnectionError("a message body is longer than its header declares")
        done = len(coming.body) - coming.left
        coming.body[done : done + count] = memoryview(data)[at:stop]
        coming.left -= count
        self.come_bytes += count
        if not whole:
            self._left -= count
            return stop
        if data[stop] != _END_BYTE:
            raise ConnectionError(_NO_END)
        self._into = None
        self._finish(coming)
        return stop + 1

    def _take(self, kind: int, channel: int, payload: bytes) -> bool:
        """Handle a whole frame; return False if it is for aiormq."""
        contents = self._contents.get(channel)
        if contents is None:
            if not channel and kind == frames.METHOD:
                self._of_connection(payload)
            return False
        if kind == frames.METHOD:
            if frames.kind_of(payload) in _WITH_CONTENT:
                self._coming[channel] = _Coming(contents, payload)
                return True
            return contents.method(payload)
        coming = self._coming.get(channel)
        if kind != frames.HEADER or coming is None:
            return False
        coming.begin(payload)
        self._finish(coming)  # an empty body is complete
        return True

    def _of_connection(self, payload: bytes) -> None:
        """Note that the broker blocks, unblocks or closes the connection."""
        method = frames.kind_of(payload)
        if method in _BLOCKING:
            self._blocked(frames.blocked(payload))
        elif method == frames.CLOSE:
            self.closed = frames.closed(payload)

    def _finish(self, coming: _Coming) -> None:
        if not coming.left:
            self._coming.pop(coming.of.number, None)
            coming.of.content(coming.content())

    def _show_life(self, seen: bool) -> None:
        now = self._clock()
        if not seen and now - self._fed_at > _SHOW_LIFE_S:
            self._feed(frames.A_HEARTBEAT)
            seen = True
        if seen:
            self._fed_at = now


class _Protocol(asyncio.StreamReaderProtocol):
    def __init__(self, reader: asyncio.StreamReader, incoming: Incoming) -> None:
        super().__init__(reader)
        self._incoming = incoming

    def data_received(self, data: bytes) -> None:
        self._incoming.received(data)


class ContentsBeside(TransportFactory):
    """Opens the socket of one connection and puts an ``Incoming`` on it."""

    socket: asyncio.Transport

    def __init__(self) -> None:
        self.blocking = Blocking()
        self.incoming = Incoming(lambda _: None)  # until there is a socket

    async def create(
        self, url: URL, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the socket.

        Raises:
            OSError: if nothing answers.
        """
        provider = options.pop("ssl_context_provider", None)
        context = await provider.get_context() if url.scheme == "amqps" else None
        reader = asyncio.StreamReader(_READ_AHEAD_BYTES)
        self.incoming = Incoming(reader.feed_data, blocked=self.blocking.set)
        protocol = _Protocol(reader, self.incoming)
        loop = asyncio.get_running_loop()
        self.socket, _ = await loop.create_connection(
            lambda: protocol, url.host or "", url.port or 0, ssl=context, **options
        )
        return reader, asyncio.StreamWriter(self.socket, protocol, reader, loop)


class Connection(aio_pika.Connection):
    """An aio_pika connection on which message traffic can bypass aiormq."""

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter("transport_factory", parser=lambda given: given),
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        self._beside = ContentsBeside()
        self.blocking = self._beside.blocking
        super().__init__(*args, **options, transport_factory=self._beside)

    @property
    def closed_by_broker(self) -> tuple[int, str] | None:
        """Code and text with which the broker closed the connection; None if it did not."""
        return self._beside.incoming.closed

    @property
    def heard(self) -> bool:
        """Whether anything was received."""
        return self._beside.incoming.heard

    @property
    def tls_alert(self) -> bool:
        """Whether the broker answered a plain connection with a TLS alert."""
        return self._beside.incoming.tls_alert

    def __del__(self) -> None:
        """Do nothing: links close their connections, and aio_pika's version needs a loop."""

    def waiting_bytes(self) -> int:
        """See ``confirms.Flow``."""
        return self._beside.socket.get_write_buffer_size()

    def queued_bytes(self) -> int | None:
        """See ``confirms.Flow``."""
        connected = self._beside.socket.get_extra_info("socket")
        return None if connected is None else queued_bytes(connected.fileno())

    def come_bytes(self) -> int:
        """See ``confirms.Flow``."""
        return self._beside.incoming.come_bytes

    async def contents(
        self,
        channel: AbstractChannel,
        delivered: Callable[[Arrived], object] | None = None,
        prefetch: int = 0,
    ) -> ContentChannel:
        """Let the message traffic of an open channel bypass aiormq from now on.

        Args:
            channel: a channel of this connection that was not published to or consumed from yet.
            delivered: called with each message that is delivered to a consumer on the channel.
            prefetch: the channel's prefetch count.

        Raises:
            AMQPError: if the channel is closed.
        """
        underlay = await channel.get_underlay_channel()
        frame_max = underlay.connection.connection_tune.frame_max or _DEFAULT_FRAME_MAX
        taken = ContentChannel(underlay.number, self._beside.socket, frame_max, delivered, prefetch)
        self._beside.incoming.hand_to(taken)
        return taken


def prepared(url: URL, name: str, context: ssl.SSLContext | None = None) -> Connection:
    """Return a connection that is not open yet; open it with ``connect(timeout)``.

    Args:
        url: the broker's URL.
        name: the name of the connection on RabbitMQ's management page.
        context: the result of ``urls.tls_context``.
    """
    return Connection(url, client_properties={"connection_name": name}, ssl_context=context)
