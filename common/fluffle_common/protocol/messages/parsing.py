"""From a decoded header to its message, and a JSON schema of all of them."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter, ValidationError

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages.base import Part
from fluffle_common.protocol.messages.of_exchange import Exchange
from fluffle_common.protocol.messages.of_journal import Event, Events
from fluffle_common.protocol.messages.of_presence import (
    Bye,
    Echo,
    Failure,
    Heartbeat,
    Hello,
    Refusal,
    Welcome,
)
from fluffle_common.protocol.messages.of_results import Evaluation, FirstWeights, Update, Verdict
from fluffle_common.protocol.messages.of_work import Evaluate, Fit, InitRequest, Stop
from fluffle_common.tensors.table import TensorEntry

WithTensors = Fit | Evaluate | FirstWeights | Update
ToWorker = Welcome | Refusal | Verdict | InitRequest | Fit | Evaluate | Stop | Exchange
FromWorker = Hello | Heartbeat | Bye | Failure | FirstWeights | Update | Evaluation | Exchange
Message = ToWorker | FromWorker | Echo | Part | Event | Events


def kinds_of(messages: Any) -> tuple[str, ...]:
    """Return the kinds of a union of messages, such as ``ToWorker``."""
    return tuple(one.model_fields["kind"].default for one in get_args(messages))


_adapter: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of every header; binary data is a string there."""
    schema = _adapter.json_schema()
    for one in schema["$defs"].values():
        if "protocol" in one.get("properties", {}):
            one["required"] = ["protocol", "kind", *one["required"]]
    entry = schema["$defs"]["TensorEntry"]  # a tuple in Python, a map on the wire
    schema["$defs"]["TensorEntry"] = {
        "type": "object",
        "properties": dict(zip(TensorEntry._fields, entry["prefixItems"], strict=True)),
        "required": [n for n in TensorEntry._fields if n not in TensorEntry._field_defaults],
        "additionalProperties": False,
    }
    return schema


def parse(header: Any) -> Message:
    """Turn a decoded header into its message.

    Raises:
        MalformedMessage: naming the first field that is wrong, and what is wrong with it; of cause
            ``sealed``, if its payload is encrypted.
    """
    kind = header.get("kind") if isinstance(header, dict) else None
    if not isinstance(kind, str):  # pydantic would print it, however deep it is nested
        raise MalformedMessage(f"kind: a string is expected, not {type(kind).__name__}")
    try:
        message = _adapter.validate_python(header)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "header"
        raise MalformedMessage(f"{where}: {first['msg']}"[:500]) from None
    if message.sealed is not None:
        raise MalformedMessage(
            f"its payload is sealed by '{message.sealed}', which cannot be opened here", "sealed"
        )
    if message.critical is not None:
        unknown = [name for name in message.critical if name not in type(message).model_fields]
        if unknown:
            raise MalformedMessage(f"critical: this side does not know '{unknown[0]}'"[:500])
    return message
