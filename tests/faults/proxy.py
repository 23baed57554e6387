"""A TCP proxy between clients and a broker that can be cut, stalled and half-closed.

It runs an event loop in its own thread; every method may be called from any thread. It forwards
bytes and does not know AMQP.

    with Proxy(broker_port) as proxy:
        ...connect to 127.0.0.1:proxy.port...
        proxy.cut(0.5, random.Random(1))
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Self, TypeVar

Side = Literal["client", "broker"]
T = TypeVar("T")

_CHUNK_BYTES = 2**16
# Over a slow line, chunks are small, so that connections take turns and buffers stay short.
_SLOW_CHUNK_BYTES, _SLOW_BUFFER_BYTES = 2**12, 2**15
_PATIENCE_S = 60.0


class Proxy:
    """Forwards every connection to ``127.0.0.1:target``, with faults on request.

    Args:
        target: the broker's port; if nothing listens there, the client's connection is reset.
        rate: the limit in bytes per second in each direction, for all connections together; None
            sets no limit.
    """

    def __init__(self, target: int, rate: float | None = None) -> None:
        self._target = target
        self._lines: dict[Side, _Line] = {"client": _Line(rate), "broker": _Line(rate)}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._connections: list[_Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server
        self.port = 0

    def __enter__(self) -> Self:
        """Listen on a free port."""
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        """Reset all connections and end the thread."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def open_connections(self) -> int:
        """Return the number of open connections."""
        return self._call(self._do(lambda: len(self._connections)))

    def aim(self, target: int) -> None:
        """Forward new connections to another port; open connections are unchanged."""
        self._target = target

    def slow(self, rate: float | None) -> None:
        """Set the limit in bytes per second in each direction; None removes it."""

        def change() -> None:
            for line in self._lines.values():
                line.rate = rate

        self._call(self._do(change))

    def slow_some(self, share: float, rate: float, seconds: float, rng: random.Random) -> int:
        """Limit a share of the connections, together, for a while.

        Returns the number of these connections.
        """
        lines: dict[Side, _Line] = {"client": _Line(rate), "broker": _Line(rate)}
        return self._each(share, rng, lambda one: one.detour(lines, seconds))

    def cut(self, share: float, rng: random.Random) -> int:
        """Reset a share of the connections on both sides; return their number."""
        return self._each(share, rng, lambda one: one.reset())

    def stall(self, share: float, seconds: float, rng: random.Random) -> int:
        """Forward nothing over a share of the connections for a while; return their number."""
        return self._each(share, rng, lambda one: one.stall(seconds))

    def half_close(self, share: float, side: Side, seconds: float, rng: random.Random) -> int:
        """End a share of the connections towards one side only; return their number.

        That side reads the end of the stream. The other side believes the connection to be alive,
        and its bytes are discarded, until both are reset after ``seconds``.
        """
        return self._each(share, rng, lambda one: one.half_close(side, seconds))

    def _each(self, share: float, rng: random.Random, act: Callable[[_Connection], None]) -> int:
        def chosen() -> int:
            count = math.ceil(share * len(self._connections))
            some = rng.sample(self._connections, count)
            for one in some:
                act(one)
            return len(some)

        return self._call(self._do(chosen))

    async def _do(self, act: Callable[[], T]) -> T:
        return act()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_S)

    async def _listen(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        if self._lines["broker"].rate is not None:  # accepted sockets inherit it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER_BYTES)
        self._server = await asyncio.start_server(
            self._accept, sock=listening, limit=_SLOW_BUFFER_BYTES // 2
        )
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        self._server.close()
        for one in list(self._connections):
            one.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            broker_reader, broker_writer = await asyncio.open_connection(
                "127.0.0.1", self._target, limit=_SLOW_BUFFER_BYTES // 2
            )
        except OSError:
            _abort(writer)
            return
        one = _Connection(writer, broker_writer, self._lines)
        self._connections.append(one)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(one.pump(reader, "broker"))
                group.create_task(one.pump(broker_reader, "client"))
        finally:
            self._connections.remove(one)
            one.reset()


class _Line:
    """One direction of a rate-limited line that connections share."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free_at = 0.0

    @property
    def chunk_bytes(self) -> int:
        """The number of bytes to send at a time."""
        return _CHUNK_BYTES if self.rate is None else _SLOW_CHUNK_BYTES

    async def carry(self, nbytes: int) -> None:
        """Wait until this many bytes have passed."""
        if self.rate is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + nbytes / self.rate
        await asyncio.sleep(self._free_at - now)


class _Connection:
    """A client's connection and the corresponding connection to the broker."""

    def __init__(
        self,
        client: asyncio.StreamWriter,
        broker: asyncio.StreamWriter,
        lines: dict[Side, _Line],
    ) -> None:
        self._lines = self._usual_lines = lines
        self._writers: dict[Side, asyncio.StreamWriter] = {"client": client, "broker": broker}
        self._flows = asyncio.Event()
        self._flows.set()
        self._ended: Side | None = None  # the side that has read the end of the stream
        self._over = asyncio.Event()

    async def pump(self, source: asyncio.StreamReader, to: Side) -> None:
        """Forward until the source ends, then end the other side."""
        with contextlib.suppress(ConnectionError):
            while data := await source.read(self._lines[to].chunk_bytes):
                await self._lines[to].carry(len(data))
                await self._flows.wait()
                if self._ended is None:
                    self._writers[to].write(data)
                    await self._writers[to].drain()
        await self._flows.wait()
        if self._ended is not None:
            await self._over.wait()  # hide what one side does from the other
        self.reset(hard=False)

    def reset(self, *, hard: bool = True) -> None:
        """Close both sides; if ``hard``, with a reset."""
        self._over.set()
        self._flows.set()
        for writer in self._writers.values():
            if hard:
                _abort(writer)
            else:
                writer.close()

    def stall(self, seconds: float) -> None:
        self._flows.clear()
        asyncio.get_running_loop().call_later(seconds, self._flows.set)

    def detour(self, lines: dict[Side, _Line], seconds: float) -> None:
        self._lines = lines

        def back() -> None:
            if self._lines is lines:  # a newer limit may have replaced it
                self._lines = self._usual_lines

        asyncio.get_running_loop().call_later(seconds, back)

    def half_close(self, side: Side, seconds: float) -> None:
        if self._ended is not None:
            return
        self._ended = side
        with contextlib.suppress(OSError, RuntimeError):
            self._writers[side].write_eof()
        asyncio.get_running_loop().call_later(seconds, self.reset)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close a socket so that its peer sees a reset."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
