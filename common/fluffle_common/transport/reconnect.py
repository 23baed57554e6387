"""Staying connected: one link after another, with a backoff that has jitter."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from fluffle_common.concurrency import cancelled
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.logs import logger
from fluffle_common.transport.base import Link, Transport

_LOG = logger("transport.link")


@dataclass(frozen=True)
class Backoff:
    """How long to wait between attempts: doubling up to ``most_s``, ``give_up_s`` in all."""

    first_s: float = 0.2
    most_s: float = 5.0
    give_up_s: float = 600.0


async def reconnecting(
    transport: Transport,
    backoff: Backoff,
    waiting: Callable[[str, float], None],
    chance: Callable[[], float] = random.random,
) -> AsyncGenerator[Link, None]:
    """Yield one link after another, each when the one before it is done with.

    Args:
        transport: where links come from.
        backoff: how long to wait between attempts, and when to give up.
        waiting: told why there is no link and in how many seconds the next attempt is made.
        chance: a number from 0 to 1, by which a pause is between half of what it may be and all of
            it: those who lost the same broker do not come back all at once.

    Raises:
        BrokerError: when no link could be opened for ``backoff.give_up_s`` seconds.
    """
    loop = asyncio.get_running_loop()
    pause, since = backoff.first_s, loop.time()
    while True:
        if cancelled():  # and the link was lost in the same moment
            raise asyncio.CancelledError
        try:
            link = await transport.open()
        except LinkLost as why:
            if loop.time() - since + pause > backoff.give_up_s:
                raise BrokerError(
                    f"no broker at {transport.address} for {backoff.give_up_s:.0f} s ({why}); "
                    "start one with 'fluffle broker up' or name one with --url"
                ) from None
            pause_s = pause * (1 + chance()) / 2
            _LOG.debug("no link: %s; the next attempt is in %.1f s", why, pause_s)
            waiting(str(why), pause_s)
            await asyncio.sleep(pause_s)
            pause = min(2 * pause, backoff.most_s)
            continue
        opened = loop.time()
        _LOG.debug("opened a link to %s", transport.address)
        try:
            yield link
        finally:
            await link.close()
            _LOG.debug("closed the link after %.1f s", loop.time() - opened)
        # A link that broke at once is no reason to hammer the broker.
        pause = backoff.first_s if loop.time() - opened > pause else min(2 * pause, backoff.most_s)
        since = loop.time()
        await asyncio.sleep(pause * (1 + chance()) / 2)
