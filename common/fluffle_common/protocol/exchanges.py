"""Who handles messages of kind ``exchange``: the same on both sides, by name.

A handler is a function from one message to those that it answers with, as the machines are. Nobody
sends an exchange again: a message may be handled twice, if a link is lost meanwhile, and an answer
may be lost with it. A protocol asks again for what it still lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.codec import PART_BYTES, encode, lay_out, read_tensors
from fluffle_common.protocol.messages import Exchange
from fluffle_common.tensors.layout import Array, Weights

_NOTHING: Weights = MappingProxyType[str, Array]({})


class Sent(NamedTuple):
    """A message to send; ``workers`` are those whom the coordinator sends it to."""

    message: Exchange
    tensors: Weights = _NOTHING
    workers: tuple[str, ...] = ()

    def body(self) -> bytes:
        """Return its bytes.

        Raises:
            ValueError: if its tensors do not travel, or are too large for one message.
        """
        table, pieces = lay_out(self.tensors)
        size_bytes = sum(map(len, pieces))
        if size_bytes > PART_BYTES:
            raise ValueError(
                f"the tensors of an exchange have {size_bytes} bytes; the limit is {PART_BYTES}"
            )
        return encode(self.message, pieces, table)


Handler = Callable[[Exchange, Weights], Iterable[Sent]]
"""Takes a message and its tensors, views that are read-only; returns what is sent for it."""


class Exchanges:
    """The handlers of one process.

    Args:
        handlers: by the ``name`` of the messages that they handle.
    """

    def __init__(self, handlers: Mapping[str, Handler] | None = None) -> None:
        self._handlers = dict(handlers or {})

    def receive(self, message: Exchange, payload: memoryview) -> list[tuple[Sent, bytes]]:
        """Give a message to its handler; return what is to be sent for it, and its bytes.

        Raises:
            MalformedMessage: of cause ``exchange``, if nobody handles it or its handler fails.
        """
        tensors = read_tensors(message.tensors, payload)
        handler = self._handlers.get(message.name)
        if handler is None:
            known = ", ".join(sorted(self._handlers)) or "none"
            raise MalformedMessage(
                f"nobody here handles the exchange '{message.name}' (handled: {known})", "exchange"
            )
        try:
            return [(sent, sent.body()) for sent in handler(message, tensors)]
        except Exception as why:
            told = " ".join(f"{type(why).__name__}: {why}".split())
            raise MalformedMessage(
                f"the handler of the exchange '{message.name}' fails: {told}"[:500], "exchange"
            ) from why
