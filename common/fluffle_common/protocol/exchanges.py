"""The handlers of ``exchange`` messages, on both sides.

A handler is a function from one message to the messages that answer it. Delivery is not reliable:
when a link is lost, a message may be handled twice and an answer may be lost. A protocol has to ask
again for what it has not received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Exchange
from fluffle_common.protocol.wire_format import PART_BYTES, encode, lay_out, read_tensors
from fluffle_common.tensors.layout import Weights

_NO_TENSORS: Weights = {}


class Sent(NamedTuple):
    """A message to send; ``workers`` are its recipients if the coordinator sends it."""

    message: Exchange
    tensors: Weights = _NO_TENSORS
    workers: tuple[str, ...] = ()

    def body(self) -> bytes:
        """Return the encoded message.

        Raises:
            ValueError: if a tensor has an unsupported dtype, or the tensors exceed ``PART_BYTES``.
        """
        table, pieces = lay_out(self.tensors)
        size_bytes = sum(map(len, pieces))
        if size_bytes > PART_BYTES:
            raise ValueError(
                f"the tensors of an exchange message have {size_bytes} bytes; the limit is "
                f"{PART_BYTES} bytes"
            )
        return encode(self.message, pieces, table)


Handler = Callable[[Exchange, Weights], Iterable[Sent]]
"""Takes a message and its tensors (read-only views); returns the messages to send."""


Handlers = Mapping[str, Handler]
"""The handlers of one process, by the ``name`` of their messages."""


def handle_exchange(
    handlers: Handlers, message: Exchange, payload: memoryview
) -> list[tuple[Sent, bytes]]:
    """Handle a message; return the messages to send, each with its encoding.

    Raises:
        MalformedMessage: with the cause ``exchange`` if there is no handler or it fails; with the
            cause ``tensors`` if the tensors are invalid.
    """
    tensors = read_tensors(message.tensors, payload)
    handler = handlers.get(message.name)
    if handler is None:
        known = ", ".join(sorted(handlers)) or "none"
        raise MalformedMessage(
            f"there is no handler for the exchange '{message.name}' (exchanges with a handler: "
            f"{known})",
            "exchange",
        )
    try:
        return [(sent, sent.body()) for sent in handler(message, tensors)]
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MalformedMessage(
            f"the handler of the exchange '{message.name}' fails: {reason}"[:500], "exchange"
        ) from error
