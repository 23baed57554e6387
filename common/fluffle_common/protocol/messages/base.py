"""The base classes of all messages, and those that travel in both directions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

from fluffle_common.protocol.messages import fields
from fluffle_common.tensors.table import MAX_TENSORS, TensorEntry

PROTOCOL: Literal[2] = 2
"""The protocol version that this package implements."""

_IDENTITY = ("kind", "run", "round", "worker")


class Model(BaseModel):
    """A pydantic model that is frozen, has strict types and ignores unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Transfer(Model):
    """The announcement of a payload that travels separately, cut into ``part`` messages.

    ``digest`` is the BLAKE3, in hexadecimal, of the concatenated BLAKE3 hashes of the parts, so
    that each part can be hashed when it arrives, in any order. BLAKE3 takes a third of the time of
    SHA-256. Without a digest, the parts are not verified.
    """

    id: fields.Id
    parts: Annotated[int, Field(ge=1, le=10**6)]
    nbytes: Annotated[int, Field(ge=1)]
    digest: fields.Digest | None = None


class Header(Model):
    """The fields that every message has.

    ``critical`` lists keys that the receiver must know; a receiver that does not know one of them
    rejects the message. ``ext`` is a flat map for private use, which fluffle ignores.

    Signatures and encrypted payloads are reserved for later: ``signature``, made with the key
    ``key_id``, is ignored; ``sealed`` names the scheme that encrypts the payload, and a message
    that has it is rejected.
    """

    protocol: Literal[2] = PROTOCOL
    federation: fields.Federation
    critical: fields.Critical | None = None
    ext: fields.Config | None = None
    key_id: fields.KeyId | None = None
    signature: fields.Signature | None = None
    sealed: fields.Scheme | None = None
    pad: bytes = b""  # aligns the payload to 64 bytes

    @property
    def identity(self) -> str:
        """The AMQP ``message_id``: the same whenever the same message is sent again."""
        parts = list(map(str, present_fields(self, _IDENTITY).values()))
        sequence = getattr(self, "sequence", None)
        if sequence not in (None, getattr(self, "round", None)):
            parts.append(str(sequence))
        return "/".join(parts)


class TensorHeader(Header):
    """A message with tensors in its payload."""

    tensors: Annotated[
        tuple[TensorEntry, ...], Strict(False), Field(max_length=MAX_TENSORS, fail_fast=True)
    ] = ()


class TransferHeader(TensorHeader):
    """A message with tensors, which travel in its payload or separately in parts."""

    transfer: Transfer | None = None


class Part(Header):
    """One part of a payload that is too large for one message; ``part`` counts from 0."""

    kind: Literal["part"] = "part"
    transfer: fields.Id
    part: Annotated[int, Field(ge=0)]


class Exchange(TensorHeader):
    """A message of a user-defined protocol, in either direction.

    ``name`` identifies the protocol and selects the handler; the meaning of ``phase`` is up to the
    protocol. ``worker`` is the sender, or None if the coordinator sends the message. Tensors travel
    in the message itself, never in parts.
    """

    kind: Literal["exchange"] = "exchange"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    phase: Annotated[str, Field(min_length=1, max_length=64)]
    run: fields.Id
    round: fields.Round
    worker: fields.WorkerId | None = None

    @property
    def identity(self) -> str:
        """The header's identity, followed by ``name`` and ``phase``."""
        return f"{super().identity}/{self.name}/{self.phase}"


def present_fields(message: BaseModel, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of these fields, leaving out those that are None or do not exist."""
    values = message.__dict__
    return {name: values[name] for name in names if values.get(name) is not None}
