"""Parsing of decoded headers into messages."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter, ValidationError

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages.base import Exchange, Part
from fluffle_common.protocol.messages.journal import Event, Events
from fluffle_common.protocol.messages.presence import (
    Bye,
    Echo,
    Failure,
    Heartbeat,
    Hello,
    Refusal,
    Welcome,
)
from fluffle_common.protocol.messages.work import (
    Evaluate,
    Evaluation,
    FirstWeights,
    Fit,
    InitRequest,
    Stop,
    Update,
    Verdict,
)

WithTensors = Fit | Evaluate | FirstWeights | Update
ToWorker = Welcome | Refusal | Verdict | InitRequest | Fit | Evaluate | Stop | Exchange
FromWorker = Hello | Heartbeat | Bye | Failure | FirstWeights | Update | Evaluation | Exchange
Message = ToWorker | FromWorker | Echo | Part | Event | Events


def kinds_of(messages: Any) -> tuple[str, ...]:
    """Return the ``kind`` of each message in a union such as ``ToWorker``."""
    return tuple(message.model_fields["kind"].default for message in get_args(messages))


_KINDS = frozenset(kinds_of(Message))
_adapter: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def parse(header: Any) -> Message:
    """Validate a decoded header and return its message.

    Raises:
        MalformedMessage: if a field is invalid, naming the first such field; with the cause
            ``sealed`` if the payload is encrypted.
    """
    kind = header.get("kind") if isinstance(header, dict) else None
    if not isinstance(kind, str):  # pydantic would print the whole value
        raise MalformedMessage(f"kind: expected a string, not {type(kind).__name__}")
    if kind not in _KINDS:  # pydantic would list all the others
        raise MalformedMessage(f"kind: unknown kind {kind[:40]!r}")
    try:
        message = _adapter.validate_python(header)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(map(str, first["loc"])) or "header"
        raise MalformedMessage(f"{path}: {first['msg']}"[:500]) from None
    if message.sealed is not None:
        raise MalformedMessage(
            f"the payload is encrypted with '{message.sealed}', which this receiver cannot decrypt",
            "sealed",
        )
    if message.critical is not None:
        unknown = [name for name in message.critical if name not in type(message).model_fields]
        if unknown:
            reason = f"critical: unknown field '{unknown[0]}', which the message depends on"
            raise MalformedMessage(reason[:500])
    return message
