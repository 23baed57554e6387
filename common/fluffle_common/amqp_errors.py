"""What aio_pika raises, as the transport contract's own errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

import aiormq.exceptions
import pamqp.exceptions

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport import Occupied, cancelled

# They log what they also raise; whoever catches it says it in our own words.
for _name in ("aio_pika", "aiormq"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

# What aio_pika and aiormq raise when a connection or channel is no longer usable.
LOST = (
    aiormq.exceptions.AMQPError,
    RuntimeError,  # of a closed channel it is a ChannelInvalidStateError, of a connection just this
    pamqp.exceptions.PAMQPException,
    ConnectionError,
    OSError,
    EOFError,
)


@contextlib.contextmanager
def as_ours() -> Iterator[None]:
    """Map foreign exceptions to the contract's, in one place."""
    try:
        yield
    except asyncio.CancelledError:
        # Closing a connection of aiormq raises this in whoever waits for something of it, which
        # taken for the real thing would end a task, or the program, without a word.
        if cancelled():
            raise
        raise LinkLost("the link was closed") from None
    except (aiormq.exceptions.ChannelAccessRefused, aiormq.exceptions.ChannelLockedResource) as no:
        raise Occupied(told(no)) from None
    except LOST as gone:
        raise LinkLost(told(gone)) from None


@contextlib.contextmanager
def declaring() -> Iterator[None]:
    """Tell what is declared otherwise; elsewhere, the same code means a consumer's time-out."""
    try:
        yield
    except aiormq.exceptions.ChannelPreconditionFailed as no:
        raise BrokerError(
            f"the broker has it with other settings ({told(no)}); use the same --queue-type "
            "everywhere, or delete the old queue"
        ) from None


def told(wrong: BaseException) -> str:
    """Say what an exception says, in one line."""
    text = " ".join(str(part) for part in wrong.args) or str(wrong)
    return text.strip() or type(wrong).__name__
