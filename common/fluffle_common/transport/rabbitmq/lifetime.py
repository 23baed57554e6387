"""The end of a link: when and why it was lost, for all its parts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fluffle_common.debug_loggers import logger
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.rabbitmq.errors import (
    Right,
    closing_error,
    error_for_reply,
    map_exceptions,
)

_LOG = logger("transport.link")


class Lifetime:
    """The shared state of the parts of one link: whether it is over, and why.

    ``close_reason`` returns the code and text with which the broker closed the connection, or None.
    """

    def __init__(self, user: str, close_reason: Callable[[], tuple[int, str] | None]) -> None:
        self.ended = asyncio.Event()
        self.end_callbacks: set[Callable[[], object]] = set()
        """Callbacks for the end of the link."""
        self._user, self._close_reason = user, close_reason
        self._why: LinkLost | BrokerError = LinkLost("the connection was closed")

    def lose(self, _: Any, why: BaseException | None = None) -> None:
        """End the link because a connection or channel closed (aio_pika's close callback)."""
        if self.ended.is_set():
            return
        if isinstance(why, LinkLost):
            self._why = why
        elif why is not None:
            self._why = closing_error(why, self._user)
        _LOG.debug("lost the link: %s", self._why)
        self.end()

    def give_up(self, why: str) -> None:
        """End the link for a reason that we found ourselves."""
        self.lose(None, LinkLost(why))

    def end(self) -> None:
        """End the link and run the callbacks."""
        self.ended.set()
        for call in tuple(self.end_callbacks):
            call()

    def error(self) -> LinkLost | BrokerError:
        """Return the reason as a new exception, so that each caller raises its own."""
        return type(self._why)(*self._why.args)

    def check(self) -> None:
        """Raise the reason if the link is over."""
        if self.ended.is_set():
            raise self.error()

    async def lost(self) -> None:
        """Return when the link is over; raise ``BrokerError`` if reconnecting cannot help."""
        await self.ended.wait()
        if isinstance(self._why, BrokerError):
            raise self.error()

    @contextlib.contextmanager
    def requesting(self, right: Right | None = None) -> Iterator[None]:
        """Map exceptions of a request that needs a permission to the contract's errors."""
        self.check()
        try:
            with map_exceptions(self._user, right):
                yield
        except LinkLost:
            reason = self._close_reason()
            if reason is not None:  # says more than what aiormq raises
                raise error_for_reply(reason[1], self._user, right) from None
            raise
