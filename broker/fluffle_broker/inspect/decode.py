"""What a message says, for whoever looks at it: pure, from one delivery to plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.codec import decode, read_groups
from fluffle_common.protocol.messages import Message, Part, Transfer
from fluffle_common.tensors.table import MODEL, TensorEntry
from fluffle_common.tensors.weights import Array, Weights
from fluffle_common.transport.base import Delivery

_FIRST_BYTES = 48
# Told elsewhere, or of no use to a reader.
_NOT_SAID = {"protocol", "federation", "pad", "kind", "tensors", "transfer"}


@dataclass(frozen=True)
class TensorFacts:
    """One tensor; what cannot be told, since its values are elsewhere, is None.

    ``norm`` (Euclidean), ``min``, ``max`` and ``mean`` are of its finite values; ``nan`` and
    ``inf`` count the others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    group: str = MODEL
    norm: float | None = None
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    nan: int | None = None
    inf: int | None = None


@dataclass(frozen=True)
class DecodedMessage:
    """A message, read.

    Args:
        delivery: what was read; it is not settled here, and its body may be let go of.
        size_bytes: the size of the body.
        message: what the body says; None where it cannot be read.
        wrong: why it cannot be read, or what is wrong with it.
        tensors: its tensors.
        first_bytes: how the body begins.
    """

    delivery: Delivery
    size_bytes: int
    message: Message | None
    wrong: str | None
    tensors: tuple[TensorFacts, ...]
    first_bytes: bytes

    @property
    def kind(self) -> str:
        """What it is; what its sender calls it, where it cannot be read."""
        if self.message is not None:
            return self.message.kind
        return self.delivery.properties.type or "unknown"

    @property
    def worker(self) -> str | None:
        """Who it is of."""
        named = getattr(self.message, "worker", None) or self.header("worker")
        return str(named) if named is not None else None

    @property
    def round(self) -> int | None:
        """Which round it belongs to."""
        number = getattr(self.message, "round", None)
        if number is None:
            number = self.header("round")
        return number if isinstance(number, int) else None

    @property
    def transfer(self) -> Transfer | None:
        """The parts that its payload travels in, apart from it."""
        told = getattr(self.message, "transfer", None)
        return told if isinstance(told, Transfer) else None

    def header(self, name: str) -> Any:
        """Return one of the headers beside the body."""
        return self.delivery.properties.headers.get(name)

    def said(self) -> dict[str, Any]:
        """Return the fields of the message, but for its tensors."""
        if self.message is None:
            return {}
        told = self.message.model_dump(exclude=_NOT_SAID, exclude_none=True)
        if isinstance(self.message, Part):
            told["transfer"] = self.message.transfer
        return told

    def age_s(self, now: float) -> float | None:
        """Return its age in seconds, by its sender's clock; ``now`` in seconds since 1970."""
        sent_at = self.delivery.sent_at
        return None if sent_at is None else max(0.0, now - sent_at)

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return everything for JSON."""
        properties = self.delivery.properties
        told = {
            "kind": self.kind,
            **self.said(),
            "size_bytes": self.size_bytes,
            "age_s": self.age_s(now),
            "redelivered": self.delivery.redelivered,
            "queue": self.delivery.queue,
            "exchange": self.delivery.exchange,
            "keys": list(self.delivery.keys),
            "message_id": properties.message_id,
            "user": properties.user,
            "durable": properties.durable,
            "headers": dict(properties.headers),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }
        if self.transfer is not None:
            told["transfer"] = self.transfer.model_dump()
        if self.wrong is not None:
            told |= {"wrong": self.wrong, "first_bytes": self.first_bytes.hex(" ")}
        return told


def decode_message(delivery: Delivery, federation: str, *, values: bool = True) -> DecodedMessage:
    """Read a delivery; whatever is wrong with it is told, never raised.

    Args:
        delivery: what was received.
        federation: the one that it should be of.
        values: whether to look at the values of its tensors too.
    """
    message: Message | None = None
    wrong: str | None = None
    tensors: tuple[TensorFacts, ...] = ()
    try:
        message, payload = decode(delivery.body)
        if message.federation != federation:
            wrong = f"it belongs to federation {message.federation}"
        table = getattr(message, "tensors", ())
        tensors = _facts(
            table, payload if values and getattr(message, "transfer", 0) is None else None
        )
    except MalformedMessage as why:
        wrong = str(why)
        tensors = _facts(getattr(message, "tensors", ()), None)
    return DecodedMessage(
        delivery, len(delivery.body), message, wrong, tensors, bytes(delivery.body[:_FIRST_BYTES])
    )


def part_of(reading: DecodedMessage) -> tuple[int, int | None] | None:
    """Return which part it is, from 1, and of how many, where its sender says; None for no part."""
    if not isinstance(reading.message, Part):
        return None
    parts = reading.header("parts")
    return reading.message.part + 1, parts if isinstance(parts, int) else None


def _facts(table: tuple[TensorEntry, ...], payload: memoryview | None) -> tuple[TensorFacts, ...]:
    groups: Mapping[str, Weights] = {} if payload is None else read_groups(table, payload)
    return tuple(
        TensorFacts(
            entry.name,
            entry.dtype,
            entry.shape,
            entry.nbytes,
            group=entry.group,
            **_measured(groups[entry.group][entry.name]) if groups else {},
        )
        for entry in table
    )


def _measured(tensor: Array) -> dict[str, Any]:
    finite = np.isfinite(tensor)
    good = tensor[finite].astype(np.float64)
    nan = int(np.isnan(tensor).sum())
    told: dict[str, Any] = {"nan": nan, "inf": int(tensor.size - finite.sum()) - nan}
    if good.size:
        with np.errstate(over="ignore"):
            figures = {
                "norm": np.linalg.norm(good),
                "min": good.min(),
                "max": good.max(),
                "mean": good.mean(),
            }
        told |= {name: float(value) for name, value in figures.items() if np.isfinite(value)}
    return told
