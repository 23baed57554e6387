"""Whether a link is there, and why it is no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.logs import logger
from fluffle_common.transport.rabbitmq.errors import Right, as_ours, meaning, told

_LOG = logger("transport.link")


class Lifetime:
    """What the parts of one link have in common: its end.

    Args:
        user: who is logged in, for errors.
        closed_by_broker: returns with what code and text the broker closed a connection, if it did.
    """

    def __init__(self, user: str, closed_by_broker: Callable[[], tuple[int, str] | None]) -> None:
        self.over = asyncio.Event()
        self.at_end: set[Callable[[], object]] = set()
        """Called when it is over."""
        self._user, self._closed_by_broker = user, closed_by_broker
        self._why: LinkLost | BrokerError = LinkLost("the link was closed")

    def lose(self, _: Any, why: BaseException | None = None) -> None:
        """Note that a connection or a channel was closed, as their callbacks say it."""
        if self.over.is_set():
            return
        if isinstance(why, LinkLost):
            self._why = why
        elif why is not None:
            meant = meaning(told(why), self._user)
            self._why = meant if isinstance(meant, BrokerError) else LinkLost(told(why))
        _LOG.debug("lost the link: %s", self._why)
        self.end()

    def give_up(self, why: str) -> None:
        """Lose the link for a reason of our own."""
        self.lose(None, LinkLost(why))

    def end(self) -> None:
        """Let everybody know that it is over."""
        self.over.set()
        for call in tuple(self.at_end):
            call()

    def error(self) -> LinkLost | BrokerError:
        """Return why it is over; a new error for each who asks."""
        return type(self._why)(str(self._why))

    def check(self) -> None:
        """Raise why it is over, if it is."""
        if self.over.is_set():
            raise self.error()

    async def lost(self) -> None:
        """Return when it is over; raise where that is not for a moment."""
        await self.over.wait()
        if isinstance(self._why, BrokerError):
            raise self.error()

    @contextlib.contextmanager
    def asking(self, right: Right | None = None) -> Iterator[None]:
        """Map what is raised while the broker is asked for something that takes a right."""
        self.check()
        try:
            with as_ours(self._user, right):
                yield
        except LinkLost:
            closed = self._closed_by_broker()
            if closed is not None:  # which says more than what aiormq raises of it
                raise meaning(closed[1], self._user, right) from None
            raise
