"""Connections whose message traffic bypasses aiormq, so that bodies are not copied.

aiormq's ``TransportFactory`` lets us open the socket. ``FrameSplitter`` splits the bytes that
arrive there into AMQP frames. Frames that carry or settle a message go to the ``ContentChannel`` of
their channel, which assembles each body in its final buffer. All other frames go to aiormq, which
keeps the handshake, channels, declarations, heartbeats and closing. This relies on AMQP's framing
(AMQP 0-9-1, section 4.2) and on no internals of aiormq.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ssl
import struct
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, ConnectionParameter
from aiormq.connection import TransportFactory
from yarl import URL

from fluffle_common.errors import LinkLost
from fluffle_common.transport.base import Blocking
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import Content, ContentChannel
from fluffle_common.transport.rabbitmq.errors import map_exceptions

_READ_AHEAD_BYTES = 2**20
_CLOSE_TIMEOUT_S = 2.0
_DEFAULT_FRAME_MAX = 131072
# aiormq closes a connection on which it sees no frame for a minute. It does not see message frames,
# so while they arrive it is given a heartbeat at this interval.
_FEED_HEARTBEAT_S = 5.0
_FRAME_HEAD, _read_head = frames.FRAME.size, frames.FRAME.unpack_from
_BODY, _END_BYTE = frames.BODY, frames.END_BYTE
_NO_END = "an AMQP frame does not end with its frame-end byte"
_WITH_CONTENT = frozenset((frames.DELIVER, frames.GET_OK, frames.RETURN))
_BLOCKING = frozenset((frames.BLOCKED, frames.UNBLOCKED))
_KINDS = frozenset((frames.METHOD, frames.HEADER, frames.BODY, frames.HEARTBEAT))
_QUEUED = struct.Struct("@i")


class FrameSplitter:
    """Splits received bytes into frames for content channels and frames for aiormq.

    ``feed`` is called with whole frames for aiormq, in order, and ``on_blocked`` with the reason
    when the broker blocks publishers, and with None when it unblocks them.
    """

    def __init__(
        self,
        feed: Callable[[bytes], object],
        clock: Callable[[], float] = time.monotonic,
        on_blocked: Callable[[str | None], object] = lambda _: None,
    ) -> None:
        self._feed, self._clock, self._on_blocked = feed, clock, on_blocked
        self._fed_at = clock()
        self._channels: dict[int, ContentChannel] = {}  # by number
        self._partial: dict[int, Content] = {}  # by number of the channel
        self._rest = b""  # the beginning of an incomplete frame
        self._in_frame: Content | None = None  # the message whose body frame is incomplete
        self._frame_missing_bytes = 0  # of that body frame, its end byte included
        self.received_bytes = 0  # total size of the received bodies
        self._foreign = False  # not AMQP 0-9-1; aiormq reports what is wrong
        self.first_bytes = b""  # the first two bytes received
        self.close_reason: tuple[int, str] | None = None  # code and text of connection.close

    def attach(self, channel: ContentChannel) -> None:
        """Pass the messages of a channel to it from now on."""
        self._channels[channel.number] = channel
        self._partial.pop(channel.number, None)

    @property
    def incomplete_bytes(self) -> int:
        """The bytes that have arrived of incomplete message bodies."""
        return sum(content.filled_bytes for content in self._partial.values())

    def data_received(self, data: bytes) -> None:
        """Handle bytes that end anywhere in a frame; raise ``ConnectionError`` if malformed."""
        if not self.first_bytes:
            self.first_bytes = data[:2]
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, end, fed = 0, len(data), False
        if self._in_frame is not None:
            at = self._fill_body(self._in_frame, data, at)
        while (start := at + _FRAME_HEAD) <= end:
            kind, channel, size = _read_head(data, at)
            if kind not in _KINDS or self._foreign:
                self._foreign = True
                self._feed(data[at:])
                return
            if kind == _BODY and channel in self._partial:
                self._in_frame, self._frame_missing_bytes = self._partial[channel], size + 1
                at = self._fill_body(self._in_frame, data, start)
                continue
            stop = start + size
            if stop >= end:
                break
            if data[stop] != _END_BYTE:
                raise ConnectionError(_NO_END)
            if not self._handle_frame(kind, channel, data[start:stop]):
                self._feed(data[at : stop + 1])
                fed = True
            at = stop + 1
        self._rest = data[at:]
        self._feed_heartbeat(fed)

    def _fill_body(self, content: Content, data: bytes, at: int) -> int:
        """Copy the bytes of a body frame into its body; return the position after them."""
        stop = at + self._frame_missing_bytes - 1  # the position of the end byte
        end = len(data)
        whole = stop < end
        if not whole:
            stop = end
        content.fill(memoryview(data)[at:stop])
        self.received_bytes += stop - at
        if not whole:
            self._frame_missing_bytes -= stop - at
            return stop
        if data[stop] != _END_BYTE:
            raise ConnectionError(_NO_END)
        self._in_frame = None
        self._finish(content)
        return stop + 1

    def _handle_frame(self, kind: int, number: int, payload: bytes) -> bool:
        """Handle a whole frame; return False if it is for aiormq."""
        channel = self._channels.get(number)
        if channel is None:
            if not number and kind == frames.METHOD:
                self._note_connection_method(payload)
            return False
        if kind == frames.METHOD:
            if frames.kind_of(payload) in _WITH_CONTENT:
                self._partial[number] = Content(channel, payload)
                return True
            return channel.method(payload)
        content = self._partial.get(number)
        if kind != frames.HEADER or content is None:
            return False
        content.begin_body(payload)
        self._finish(content)  # an empty body is complete
        return True

    def _note_connection_method(self, payload: bytes) -> None:
        """Note that the broker blocks, unblocks or closes the connection."""
        method = frames.kind_of(payload)
        if method in _BLOCKING:
            self._on_blocked(frames.blocked_reason(payload))
        elif method == frames.CLOSE:
            self.close_reason = frames.close_reason(payload)

    def _finish(self, content: Content) -> None:
        """Pass a message on if its body is complete."""
        if not content.missing_bytes:
            self._partial.pop(content.channel.number, None)
            content.channel.content(content)

    def _feed_heartbeat(self, fed: bool) -> None:
        """Give aiormq a heartbeat if it was fed nothing for a while."""
        now = self._clock()
        if not fed and now - self._fed_at > _FEED_HEARTBEAT_S:
            self._feed(frames.HEARTBEAT_FRAME)
            fed = True
        if fed:
            self._fed_at = now


class _Protocol(asyncio.StreamReaderProtocol):
    def __init__(self, reader: asyncio.StreamReader, splitter: FrameSplitter) -> None:
        super().__init__(reader)
        self._splitter = splitter

    def data_received(self, data: bytes) -> None:
        self._splitter.data_received(data)


class SocketFactory(TransportFactory):
    """Opens the socket of one connection and puts a ``FrameSplitter`` on it."""

    socket: asyncio.Transport

    def __init__(self) -> None:
        self.blocking = Blocking()
        self.splitter = FrameSplitter(lambda _: None)  # until there is a socket

    async def create(
        self, url: URL, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the socket; raise ``OSError`` if nothing answers."""
        provider = options.pop("ssl_context_provider", None)
        context = None
        if url.scheme == "amqps":
            context = await provider.get_context()
            options["ssl_shutdown_timeout"] = _CLOSE_TIMEOUT_S  # of a broker that does not answer
        reader = asyncio.StreamReader(_READ_AHEAD_BYTES)
        self.splitter = FrameSplitter(reader.feed_data, on_blocked=self.blocking.set)
        protocol = _Protocol(reader, self.splitter)
        loop = asyncio.get_running_loop()
        self.socket, _ = await loop.create_connection(
            lambda: protocol, url.host or "", url.port or 0, ssl=context, **options
        )
        return reader, asyncio.StreamWriter(self.socket, protocol, reader, loop)


class Connection(aio_pika.Connection):
    """An aio_pika connection on which message traffic can bypass aiormq.

    ``connect()`` opens it; ``name`` is its name on RabbitMQ's management page.
    """

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter("transport_factory", parser=lambda factory: factory),
    )

    def __init__(self, url: URL, name: str, context: ssl.SSLContext | None = None) -> None:
        self._sockets = SocketFactory()
        self.blocking = self._sockets.blocking
        super().__init__(
            url,
            client_properties={"connection_name": name},
            ssl_context=context,
            transport_factory=self._sockets,
        )

    @property
    def splitter(self) -> FrameSplitter:
        """What has arrived on this connection."""
        return self._sockets.splitter

    def __del__(self) -> None:
        """Do nothing: links close their connections, and aio_pika's version needs a loop."""

    def abort(self) -> None:
        """Close the socket at once, and drop the bytes that have not left."""
        self._sockets.socket.abort()

    def buffered_bytes(self) -> int:
        """Return how many bytes this process has not yet passed to the operating system."""
        return self._sockets.socket.get_write_buffer_size()

    def queued_bytes(self) -> int | None:
        """Return how many sent bytes the peer's TCP has not acknowledged; None if unknown."""
        socket = self._sockets.socket.get_extra_info("socket")
        return None if socket is None else queued_bytes(socket.fileno())

    async def content_channel(
        self,
        channel: AbstractChannel,
        on_delivery: Callable[[Content], object] | None = None,
        prefetch: int = 0,
    ) -> ContentChannel:
        """Let the message traffic of an open channel bypass aiormq from now on.

        The channel must be new: neither published to nor consumed from. For the other arguments,
        see ``ContentChannel``.
        """
        underlay = await channel.get_underlay_channel()
        frame_max = underlay.connection.connection_tune.frame_max or _DEFAULT_FRAME_MAX
        content_channel = ContentChannel(
            underlay.number, self._sockets.socket, frame_max, on_delivery, prefetch
        )
        self.splitter.attach(content_channel)
        return content_channel


async def close(connection: Connection) -> None:
    """Close a connection within a short timeout; this never raises.

    aiormq waits until all bytes have left. Over a stalled line, or if the broker is blocked, that
    may take forever, however often aiormq is cancelled.
    """
    aborting = asyncio.get_running_loop().call_later(_CLOSE_TIMEOUT_S, connection.abort)
    try:
        with contextlib.suppress(LinkLost), map_exceptions():
            await connection.close()
    finally:
        aborting.cancel()


def queued_bytes(descriptor: int) -> int | None:
    """Return how many bytes in a socket's send queue the peer's TCP has not acknowledged.

    Returns None on systems that do not report it, and for a closed socket.
    """
    if sys.platform != "linux":
        return None
    try:
        buffer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(_QUEUED.size))
    except (OSError, ValueError):  # it is closed
        return None
    nbytes: int = _QUEUED.unpack(buffer)[0]
    return nbytes
