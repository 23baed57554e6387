"""What a worker takes as mail, and what it refuses."""

from __future__ import annotations

from fluffle_common.errors import MalformedMessage
from fluffle_common.messages import Evaluate, Fit, Message, Part, ToWorker
from fluffle_common.transport import Body
from fluffle_common.weights import Weights, check_finite
from fluffle_common.wire import decode, read_tensors


def check_mail(body: Body, federation: str) -> None:
    """Check a message as thoroughly as if it were taken.

    Raises:
        MalformedMessage: where it would be refused.
    """
    message, payload = decode(body, federation)
    if not isinstance(message, ToWorker | Part):
        raise no_mail(message)
    if isinstance(message, Fit | Evaluate) and message.transfer is None:
        weights_of(message, payload)


def no_mail(message: Message) -> MalformedMessage:
    """Return what is wrong with a message of a kind that workers are not sent."""
    return MalformedMessage(f"a message of kind {message.kind} is no mail for a worker", "kind")


def weights_of(message: Fit | Evaluate, payload: memoryview) -> Weights:
    """Return the weights that work brings.

    Raises:
        MalformedMessage: where they are not what the message says, or not finite.
    """
    weights = read_tensors(message.tensors, payload)
    try:
        check_finite(weights)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "not_finite") from None
    return weights
