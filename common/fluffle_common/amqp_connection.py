"""How connections are opened, and how large bodies get past aiormq without being copied by it.

aiormq copies a body some eight times in either direction. So it never sees a large one: it sends a
*token* where the body belongs, which is replaced on the way to the socket, and it receives a header
that says "no body", while the body is put together here and waits for whoever takes the delivery.

Only AMQP's own framing is touched (AMQP 0-9-1, section 4.2), outside of aiormq, at the two ends of
the sockets that its ``TransportFactory`` lets us open; channels, confirms, flow control and
heartbeats stay aiormq's.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aio_pika
import numpy as np
from aio_pika.abc import ConnectionParameter
from aiormq.connection import TransportFactory
from yarl import URL

from fluffle_common.transport import Body

# Smaller ones are as well off with aiormq.
LARGE_BYTES = 16 * 2**10
_READ_AHEAD_BYTES = 2**20
_DEFAULT_FRAME_MAX = 131072

_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_FRAME = struct.Struct(">BHI")  # type, channel, size; then the payload and one byte that ends it
_END = b"\xce"
_KIND, _TAG, _SIZE = struct.Struct(">HH"), struct.Struct(">Q"), struct.Struct(">Q")
_DELIVER, _GET_OK = (60, 60), (60, 71)
_TUNE_OK = _KIND.pack(10, 31)
_CHANNEL_CLOSE, _CHANNEL_CLOSE_OK = (20, 40), (20, 41)
_SIZE_AT = _FRAME.size + 4  # in the frame of a content's header, after class and weight
_TOKEN_BYTES = 16


@dataclass(eq=False)
class _Content:
    """A large body that is coming in."""

    header: bytes  # its frame, saying that there is no body
    tag: int | None  # of its delivery; None for what was returned to us
    body: memoryview
    done: int = 0


class Incoming:
    """Takes the bytes from the socket; passes on all but large bodies, which it keeps.

    Args:
        feed: given whole frames, in order.
    """

    def __init__(self, feed: Callable[[bytes], object]) -> None:
        self._feed = feed
        self._bodies: dict[tuple[int, int], memoryview] = {}  # by channel and delivery tag
        self._tags: dict[int, int | None] = {}  # of what each channel is about to deliver
        self._contents: dict[int, _Content] = {}  # by channel
        self._frame = bytearray()  # as much of the next one as is there
        self._into: _Content | None = None  # whose body frame we are in
        self._left = 0  # bytes of it that are still to come, its end included
        self._foreign = False  # no AMQP 0-9-1 at all: aiormq says what is wrong

    def take(self, channel: int, tag: int) -> memoryview | None:
        """Return a delivery's body, once; None where aiormq has it."""
        return self._bodies.pop((channel, tag), None)

    def received(self, data: bytes) -> None:
        """Take what the socket gave, in whatever pieces.

        Raises:
            ConnectionError: where a frame does not end where it said it would.
        """
        view = memoryview(data)
        while view:
            if self._foreign:
                self._feed(bytes(view))
                return
            count = self._collect(view) if self._into is None else self._fill(self._into, view)
            view = view[count:]

    def _fill(self, content: _Content, view: memoryview) -> int:
        """Take bytes of a body's frame; return how many."""
        count = min(self._left - 1, len(view))
        content.body[content.done : content.done + count] = view[:count]
        content.done += count
        self._left -= count
        if self._left == 1 and count < len(view):
            if view[count : count + 1] != _END:
                raise ConnectionError("a frame does not end where it said it would")
            count, self._into = count + 1, None
            if content.done == len(content.body):
                self._finish(content)
        return count

    def _collect(self, view: memoryview) -> int:
        """Take bytes up to the end of a frame, or of its head; return how many."""
        frame = self._frame
        whole = _FRAME.size
        if len(frame) >= _FRAME.size:
            whole += _FRAME.unpack_from(frame)[2] + len(_END)
        count = min(whole - len(frame), len(view))
        frame += view[:count]
        if frame[0] not in (_METHOD, _HEADER, _BODY, _HEARTBEAT):
            self._foreign = True
            self._pass_on()
        elif len(frame) == _FRAME.size:
            kind, channel, size = _FRAME.unpack(frame)
            if kind == _BODY and channel in self._contents:
                self._into, self._left = self._contents[channel], size + len(_END)
                frame.clear()
        elif len(frame) == whole:
            self._whole()
        return count

    def _whole(self) -> None:
        kind, channel, _ = _FRAME.unpack_from(self._frame)
        if kind == _METHOD:
            self._method(channel)
        elif kind == _HEADER and _SIZE.unpack_from(self._frame, _SIZE_AT)[0] >= LARGE_BYTES:
            self._begin(channel)
            return
        self._pass_on()

    def _method(self, channel: int) -> None:
        method = _KIND.unpack_from(self._frame, _FRAME.size)
        arguments = _FRAME.size + _KIND.size
        if method == _DELIVER:  # the consumer's tag is first, a string with its length before it
            arguments += 1 + self._frame[arguments]
        if method in (_DELIVER, _GET_OK):
            (self._tags[channel],) = _TAG.unpack_from(self._frame, arguments)
        else:
            self._tags[channel] = None
        if method in (_CHANNEL_CLOSE, _CHANNEL_CLOSE_OK):  # its number may be used again
            self._bodies = {key: body for key, body in self._bodies.items() if key[0] != channel}

    def _begin(self, channel: int) -> None:
        """Begin a large body; its header is passed on when it is there."""
        header = bytearray(self._frame)
        self._frame.clear()
        (size,) = _SIZE.unpack_from(header, _SIZE_AT)
        _SIZE.pack_into(header, _SIZE_AT, 0)
        body = np.empty(size, np.uint8).data  # not zeroed: it is filled anyway
        self._contents[channel] = _Content(bytes(header), self._tags.get(channel), body)

    def _finish(self, content: _Content) -> None:
        channel = _FRAME.unpack_from(content.header)[1]
        del self._contents[channel]
        if content.tag is not None:
            self._bodies[channel, content.tag] = content.body.toreadonly()
        self._feed(content.header)

    def _pass_on(self) -> None:
        self._feed(bytes(self._frame))
        self._frame.clear()


class Outgoing:
    """Puts bodies where their tokens are."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, Body] = {}
        self._frame_max = _DEFAULT_FRAME_MAX

    @contextlib.contextmanager
    def token(self, body: Body) -> Iterator[bytes]:
        """Yield what to publish instead of ``body``."""
        token = uuid.uuid4().bytes
        self._waiting[token] = body
        try:
            yield token
        finally:
            self._waiting.pop(token, None)

    def expand(self, data: bytes) -> list[Body]:
        """Return what to write instead of ``data``, the frames of one method and its content."""
        method = data[_FRAME.size : _FRAME.size + _KIND.size]
        if data[0] == _METHOD and method == _TUNE_OK:
            (most,) = struct.unpack_from(">I", data, _FRAME.size + _KIND.size + 2)
            self._frame_max = most or _DEFAULT_FRAME_MAX
        end = len(data) - len(_END)
        body = self._waiting.pop(data[end - _TOKEN_BYTES : end], None)
        if body is None:
            return [data]
        _, channel, size = _FRAME.unpack_from(data)
        size_at = _FRAME.size + size + len(_END) + _SIZE_AT
        head = bytearray(data[: end - _TOKEN_BYTES - _FRAME.size])
        _SIZE.pack_into(head, size_at, len(body))
        return [bytes(head), *self._frames(channel, memoryview(body))]

    def _frames(self, channel: int, body: memoryview) -> Iterator[Body]:
        room = self._frame_max - _FRAME.size - len(_END)
        for start in range(0, len(body), room):
            piece = body[start : start + room]
            yield _FRAME.pack(_BODY, channel, len(piece))
            yield piece
            yield _END


class _Protocol(asyncio.StreamReaderProtocol):
    def __init__(self, reader: asyncio.StreamReader, incoming: Incoming) -> None:
        super().__init__(reader)
        self._incoming = incoming

    def data_received(self, data: bytes) -> None:
        self._incoming.received(data)


class _Writer(asyncio.StreamWriter):
    outgoing: Outgoing

    def write(self, data: Any) -> None:
        pieces = self.outgoing.expand(data)
        if len(pieces) == 1:
            super().write(pieces[0])
        else:
            self.writelines(pieces)


class BodiesBeside(TransportFactory):
    """Opens the socket of one connection."""

    incoming: Incoming

    def __init__(self) -> None:
        self.outgoing = Outgoing()

    async def create(
        self, url: URL, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open it.

        Raises:
            OSError: where nothing answers.
        """
        provider = options.pop("ssl_context_provider", None)
        ssl = await provider.get_context() if url.scheme == "amqps" else None
        reader = asyncio.StreamReader(_READ_AHEAD_BYTES)
        self.incoming = Incoming(reader.feed_data)
        protocol = _Protocol(reader, self.incoming)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            lambda: protocol, url.host or "", url.port or 0, ssl=ssl, **options
        )
        writer = _Writer(transport, protocol, reader, loop)
        writer.outgoing = self.outgoing
        return reader, writer


class Connection(aio_pika.Connection):
    """A connection whose large bodies are beside it."""

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter("transport_factory", parser=lambda given: given),
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        self.beside = BodiesBeside()
        super().__init__(*args, **options, transport_factory=self.beside)


async def connect(url: URL, name: str, timeout_s: float) -> Connection:
    """Open a connection that shows as ``name`` in RabbitMQ's own pages.

    Raises:
        AMQPError: where the broker refuses us.
        OSError: where nothing answers.
    """
    return await aio_pika.connect(
        url,
        client_properties={"connection_name": name},
        timeout=timeout_s,
        connection_class=Connection,
    )
