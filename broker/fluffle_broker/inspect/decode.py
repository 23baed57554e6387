"""Decoding a delivery for display: its fields, its tensors and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fluffle_common.cli.console import finite
from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Message, Part, Transfer
from fluffle_common.protocol.wire_format import decode, read_groups
from fluffle_common.tensors.table import MODEL, TensorEntry
from fluffle_common.tensors.weights import Array, Weights
from fluffle_common.transport.base import Delivery

_FIRST_BYTES = 48
# Fields that are shown elsewhere or do not help a reader.
_HIDDEN_FIELDS = {"protocol", "federation", "pad", "kind", "tensors", "transfer"}


@dataclass(frozen=True)
class TensorFacts:
    """The description of one tensor; statistics are None if its values are not in the message.

    ``norm`` (Euclidean), ``min``, ``max`` and ``mean`` cover the finite values; ``nan`` and ``inf``
    count the others.
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
    """A decoded delivery."""

    delivery: Delivery  # not settled here; its body may have been dropped
    size_bytes: int  # of the body
    message: Message | None  # the header; None if the body is not a valid message
    wrong: str | None  # what is wrong with the message, if anything
    tensors: tuple[TensorFacts, ...]
    first_bytes: bytes  # of the body

    @property
    def kind(self) -> str:
        """The kind of the message; the AMQP type if the body is invalid."""
        if self.message is not None:
            return self.message.kind
        return self.delivery.properties.type or "unknown"

    @property
    def worker(self) -> str | None:
        """The worker that the message names."""
        named = getattr(self.message, "worker", None) or self.header("worker")
        return str(named) if named is not None else None

    @property
    def round(self) -> int | None:
        """The round that the message belongs to."""
        number = getattr(self.message, "round", None)
        if number is None:
            number = self.header("round")
        return number if isinstance(number, int) else None

    @property
    def transfer(self) -> Transfer | None:
        """The transfer of its payload, if that travels in parts."""
        transfer = getattr(self.message, "transfer", None)
        return transfer if isinstance(transfer, Transfer) else None

    def header(self, name: str) -> Any:
        """Return an AMQP header, or None."""
        return self.delivery.properties.headers.get(name)

    def fields(self) -> dict[str, Any]:
        """Return the fields of the message, without its tensors."""
        if self.message is None:
            return {}
        fields = self.message.model_dump(exclude=_HIDDEN_FIELDS, exclude_none=True)
        if isinstance(self.message, Part):
            fields["transfer"] = self.message.transfer
        return fields

    def age_s(self, now: float) -> float | None:
        """Return its age in seconds by its sender's clock; ``now`` is in seconds since 1970."""
        sent_at = self.delivery.sent_at
        return None if sent_at is None else max(0.0, now - sent_at)

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return everything as a JSON object; null stands for NaN."""
        properties = self.delivery.properties
        fields = {
            "kind": self.kind,
            **self.fields(),
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
            fields["transfer"] = self.transfer.model_dump()
        if self.wrong is not None:
            fields |= {"wrong": self.wrong, "first_bytes": self.first_bytes.hex(" ")}
        return dict(finite(fields))  # anyone can send an event with any values


def decode_message(delivery: Delivery, federation: str, *, values: bool = True) -> DecodedMessage:
    """Decode a delivery; an error ends up in ``wrong`` and is never raised.

    Without ``values``, there are no statistics of its tensors.
    """
    message: Message | None = None
    wrong: str | None = None
    tensors: tuple[TensorFacts, ...] = ()
    try:
        message, payload = decode(delivery.body)
        if message.federation != federation:
            wrong = f"the message belongs to federation {message.federation}, not to {federation}"
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


def part_of(decoded: DecodedMessage) -> tuple[int, int | None] | None:
    """Return a part's number, from 1, and the number of parts if known; None if not a part."""
    if not isinstance(decoded.message, Part):
        return None
    parts = decoded.header("parts")
    return decoded.message.part + 1, parts if isinstance(parts, int) else None


def _facts(table: tuple[TensorEntry, ...], payload: memoryview | None) -> tuple[TensorFacts, ...]:
    groups: Mapping[str, Weights] = {} if payload is None else read_groups(table, payload)
    return tuple(
        TensorFacts(
            entry.name,
            entry.dtype,
            entry.shape,
            entry.nbytes,
            group=entry.group,
            **_statistics(groups[entry.group][entry.name]) if groups else {},
        )
        for entry in table
    )


def _statistics(tensor: Array) -> dict[str, Any]:
    finite = np.isfinite(tensor)
    values = tensor[finite].astype(np.float64)
    nan = int(np.isnan(tensor).sum())
    facts: dict[str, Any] = {"nan": nan, "inf": int(tensor.size - finite.sum()) - nan}
    if values.size:
        with np.errstate(over="ignore"):
            figures = {
                "norm": np.linalg.norm(values),
                "min": values.min(),
                "max": values.max(),
                "mean": values.mean(),
            }
        facts |= {name: float(value) for name, value in figures.items() if np.isfinite(value)}
    return facts
