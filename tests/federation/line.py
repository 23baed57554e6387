"""A transport between one process and the broker that tests can cut, hold and slow down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import pytest

from fluffle_common.errors import LinkLost
from fluffle_common.protocol.topology import Entity
from fluffle_common.transport.base import Body, Delivery, Link, Properties, Transport
from fluffle_common.transport.memory import MemoryBroker, MemoryLink


class Line(Transport):
    """The connection of one process to the broker."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self.links: list[MemoryLink] = []
        self.up = True
        self.bytes_per_s = 0.0  # 0 means unlimited
        self._passes = asyncio.Event()  # set while incoming messages may pass
        self._accepts = asyncio.Event()  # set while outgoing messages may pass
        self._passes.set()
        self._accepts.set()
        self._sending = asyncio.Lock()
        self.lose_next: set[str] = set()  # kinds of messages that cut the link

    @property
    def address(self) -> str:
        return "memory"

    async def open(self) -> Link:
        if not self.up:
            raise LinkLost("the line is down")
        link = await self._broker.open()
        self.links.append(link)
        return _Slow(link, self)

    def cut(self) -> None:
        """Lose all links."""
        for link in self.links:
            link.cut()
        self.links.clear()

    def down(self) -> None:
        """Lose all links and open no new one."""
        self.up = False
        self.cut()

    def hold(self, *, incoming: bool = False, outgoing: bool = False) -> None:
        """Let no message pass until ``release``."""
        if incoming:
            self._passes.clear()
        if outgoing:
            self._accepts.clear()

    def release(self) -> None:
        """Let all messages pass again."""
        self._passes.set()
        self._accepts.set()

    async def passes(self) -> None:
        """Wait until incoming messages may pass."""
        await self._passes.wait()

    async def send(self, body: Body, *, urgent: bool) -> None:
        """Wait until a message has passed; messages that are not urgent pass one at a time."""
        await self._accepts.wait()
        if self.bytes_per_s and not urgent:
            async with self._sending:
                await asyncio.sleep(len(body) / self.bytes_per_s)


class _Slow(Link):
    """A link over a line; publishing, consuming and some requests are delayed."""

    def __init__(self, link: MemoryLink, line: Line) -> None:
        self._link, self._line, self._consumes = link, line, False

    def __getattribute__(self, name: str) -> Any:
        ours = ("_link", "_line", "publish", "consume", "get", "_deliveries", "declare", "exists")
        ours += ("_consumes",)
        if name in ours or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(self._link, name)

    async def declare(self, entities: Iterable[Entity]) -> None:
        await self._link.declare(entities)

    async def exists(self, exchange: str) -> bool:
        if self._consumes:  # the answer waits behind the messages
            await self._line.passes()
        return await self._link.exists(exchange)

    async def publish(
        self,
        body: Body,
        properties: Properties,
        *,
        exchange: str,
        keys: Sequence[str],
        **options: Any,
    ) -> None:
        await self._line.send(body, urgent=bool(options.get("urgent")))
        if properties.type in self._line.lose_next:
            self._line.lose_next.discard(properties.type)
            self._line.cut()
        await self._link.publish(body, properties, exchange=exchange, keys=keys, **options)

    async def consume(
        self, queue: str, *, prefetch: int, exclusive: bool = False
    ) -> AsyncGenerator[Delivery]:
        self._consumes = True
        return self._deliveries(
            await self._link.consume(queue, prefetch=prefetch, exclusive=exclusive)
        )

    async def _deliveries(self, source: AsyncGenerator[Delivery]) -> AsyncGenerator[Delivery]:
        async with contextlib.aclosing(source):
            async for delivery in source:
                await self._line.passes()
                yield delivery

    async def get(self, queue: str, *, foreign: bool = False) -> Delivery | None:
        await self._line.passes()
        return await self._link.get(queue, foreign=foreign)


def cut_at_first(monkeypatch: pytest.MonkeyPatch, method: str) -> list[MemoryLink]:
    """Cut the next link on which ``method`` is called, before the call; return it in a list."""
    original, cut = getattr(MemoryLink, method), list[MemoryLink]()

    async def cutting(link: MemoryLink, *args: Any) -> Any:
        if not cut:
            cut.append(link)
            link.cut()
        return await original(link, *args)

    monkeypatch.setattr(MemoryLink, method, cutting)
    return cut
