"""What all messages have in common: the header, tensors, and a payload in parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgpack
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from fluffle_common.protocol.messages.fields import (
    Critical,
    Extension,
    Federation,
    Id,
    KeyId,
    Scheme,
    Signature,
)
from fluffle_common.tensors.table import MAX_TENSORS, MOST_TENSORS_KEPT, TABLES_KEPT, TensorEntry

PROTOCOL: Literal[2] = 2
"""The version of the protocol that is spoken here."""

_IDENTITY = ("kind", "run", "round", "worker")

_TABLES: dict[bytes, tuple[TensorEntry, ...]] = {}


def _checked_once(table: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check a table that has been checked before by looking for it.

    What is packed into the same bytes is of the same types and values throughout.
    """
    if not isinstance(table, list) or len(table) > MOST_TENSORS_KEPT:
        return check(table)
    try:
        packed = msgpack.packb(table)
    except (TypeError, ValueError, OverflowError):
        return check(table)
    known = _TABLES.get(packed)
    if known is None:
        known = check(table)
        if len(_TABLES) >= TABLES_KEPT:
            del _TABLES[next(iter(_TABLES))]  # the oldest
        _TABLES[packed] = known
    return known


class Model(BaseModel):
    """What is read from a message: frozen, strict in its types; unknown keys are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Transfer(Model):
    """A payload that travels apart from its message, cut into ``part`` messages.

    ``digest`` is BLAKE3, in hexadecimal, of the parts' own BLAKE3 one after the other: so each part
    can be hashed as it comes, in any order, and none can be another than was announced. BLAKE3
    takes a third of the time of SHA-256, of which a round of large models has ten hashes. None:
    its sender does not say.
    """

    id: Id
    parts: Annotated[int, Field(ge=1, le=10**6)]
    nbytes: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class Header(Model):
    """What every message says first.

    ``critical`` names the keys without which the message would be misunderstood: whoever does not
    know one of them refuses the message. ``ext`` is for private use, and flat: it is passed over.

    There is room for signatures and for encrypted payloads: ``signature`` is by the key ``key_id``,
    and is passed over here; ``sealed`` names the scheme by which the payload is encrypted, and a
    message that has it is refused here.
    """

    protocol: Literal[2] = PROTOCOL
    federation: Federation
    critical: Critical | None = None
    ext: Extension | None = None
    key_id: KeyId | None = None
    signature: Signature | None = None
    sealed: Scheme | None = None
    pad: bytes = b""  # fills the header up, so that the payload starts at a multiple of 64 bytes

    @property
    def identity(self) -> str:
        """What makes two messages the same message: the AMQP ``message_id``, kept on a resend."""
        told = [str(value) for value in told_of(self, _IDENTITY).values()]
        sequence = getattr(self, "sequence", None)
        if sequence not in (None, getattr(self, "round", None)):
            told.append(str(sequence))
        return "/".join(told)


class TensorHeader(Header):
    """A message whose payload is tensors."""

    tensors: Annotated[
        tuple[TensorEntry, ...],
        Strict(False),
        Field(max_length=MAX_TENSORS),
        WrapValidator(_checked_once),
    ] = ()


class TransferHeader(TensorHeader):
    """A message whose payload is tensors, which may travel in parts."""

    transfer: Transfer | None = None


class Part(Header):
    """One piece of a payload too large for one message; ``part`` counts from 0."""

    kind: Literal["part"] = "part"
    transfer: Id
    part: Annotated[int, Field(ge=0)]


def told_of(message: BaseModel, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return those of some fields that a message has a value for."""
    values = message.__dict__
    return {name: values[name] for name in fields if values.get(name) is not None}
