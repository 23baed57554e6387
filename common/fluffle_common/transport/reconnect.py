"""Reconnecting to the broker, with exponential backoff and jitter."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from fluffle_common.concurrency import cancelled
from fluffle_common.debug_loggers import logger
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.base import Link, Transport

_LOG = logger("transport.link")


@dataclass(frozen=True)
class Backoff:
    """The pause between attempts, which doubles up to ``most_s``, and the total time limit."""

    first_s: float = 0.2
    most_s: float = 5.0
    give_up_s: float = 600.0


async def reconnecting(
    transport: Transport,
    backoff: Backoff,
    on_failure: Callable[[str], None],
    random_fraction: Callable[[], float] = random.random,
) -> AsyncGenerator[Link, None]:
    """Yield one open link at a time; asking for the next one closes it and reconnects.

    ``on_failure`` is called with the reason when attempts begin to fail, and when it changes.
    Each pause lasts between half and all of the current delay, as ``random_fraction`` says, so that
    clients of a restarted broker do not reconnect at once.

    Raises:
        BrokerError: if no link could be opened for ``backoff.give_up_s`` seconds.
    """
    loop = asyncio.get_running_loop()
    delay_s, down_since, reported = backoff.first_s, loop.time(), ""
    while True:
        if cancelled():  # possibly at the same moment as the link was lost
            raise asyncio.CancelledError
        try:
            link = await transport.open()
        except LinkLost as error:
            if loop.time() - down_since + delay_s > backoff.give_up_s:
                raise BrokerError(
                    f"still no broker at {transport.address} after {backoff.give_up_s:.0f} s "
                    f"({error}); start one with 'fluffle broker up' or give its URL with --url"
                ) from None
            pause_s = delay_s * (1 + random_fraction()) / 2
            _LOG.debug("no link: %s; the next attempt is in %.1f s", error, pause_s)
            if str(error) != reported:
                reported = str(error)
                on_failure(reported)
            await asyncio.sleep(pause_s)
            delay_s = min(2 * delay_s, backoff.most_s)
            continue
        opened_at, reported = loop.time(), ""
        _LOG.debug("opened a link to %s", transport.address)
        try:
            yield link
        finally:
            await link.close()
            _LOG.debug("closed the link after %.1f s", loop.time() - opened_at)
        # If the link was lost at once, keep backing off.
        lasted = loop.time() - opened_at > delay_s
        delay_s = backoff.first_s if lasted else min(2 * delay_s, backoff.most_s)
        down_since = loop.time()
        await asyncio.sleep(delay_s * (1 + random_fraction()) / 2)
