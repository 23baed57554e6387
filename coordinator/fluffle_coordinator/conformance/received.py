"""What a conformance check receives from a worker, and pure functions that judge it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fluffle_common.protocol.messages import FromWorker, Heartbeat, Hello, Update
from fluffle_common.transport.base import Delivery
from fluffle_coordinator.machine.state import Rules

_DURABLE = ("update", "evaluation", "first_weights", "failure")


class Unmet(Exception):
    """The worker does not meet a requirement; the text says what it did."""


class Skipped(Exception):
    """A scenario cannot be tried with this worker; the text says why."""


class Received(NamedTuple):
    """A message with the payload that it carried itself.

    ``at`` is the time of its arrival, in seconds of a monotonic clock.
    """

    at: float
    message: FromWorker
    payload: memoryview = memoryview(b"")


class ReceivedUpdate(NamedTuple):
    """An update with its complete payload."""

    update: Update
    payload: memoryview


def envelope_faults(message: FromWorker, delivery: Delivery) -> list[str]:
    """Return what is wrong with the routing key and the AMQP properties of a message."""
    kind, properties = message.kind, delivery.properties
    key = f"{kind}.{message.worker}"
    faults = []
    if key not in delivery.keys:
        faults.append(f"the {kind} message has the routing key {delivery.keys[0]}, not {key}")
    if properties.type != kind:
        faults.append(f"the {kind} message has the AMQP type '{properties.type}', not '{kind}'")
    if not properties.message_id:
        faults.append(f"the {kind} message has no message_id")
    if kind in _DURABLE and not properties.durable:
        faults.append(f"the {kind} message is not persistent; set delivery_mode to 2")
    return faults


def signs_of_life(messages: Sequence[Received]) -> list[tuple[float, Hello | Heartbeat]]:
    """Return the hellos and heartbeats among messages, with the times of their arrival."""
    return [(at, each) for at, each, _ in messages if isinstance(each, Hello | Heartbeat)]


def check_rhythm(messages: Sequence[Received], now: float) -> str:
    """Return a worker's rhythm in words; ``Unmet`` if a silence would have it count as gone."""
    signs = signs_of_life(messages)
    if not signs:
        raise Unmet("the worker sent no heartbeat")
    every_s = max(sign.heartbeat_s for _, sign in signs)
    times = [*(at for at, _ in signs), now]
    longest_s = max(later - earlier for earlier, later in pairwise(times))
    summary = f"{len(signs)} heartbeats (announced: one every {every_s:g} s)"
    if longest_s > Rules.patience * every_s:
        raise Unmet(f"the worker sent {summary}, but none for {longest_s:.1f} s")
    return f"{summary}, with a longest pause of {longest_s:.1f} s"


def same_answer(one: ReceivedUpdate, other: ReceivedUpdate) -> bool:
    """Return whether two updates come from the same training, which ``seconds`` reveals.

    The transfer is ignored, because a payload in parts gets a new id each time it is sent.
    """
    headers = [each.update.model_dump(exclude={"transfer", "pad"}) for each in (one, other)]
    return headers[0] == headers[1] and one.payload == other.payload


def at_work_on(message: Hello | Heartbeat) -> str:
    """Return the state in a worker's message, for people.

    >>> at_work_on(Heartbeat(federation="f", worker="w", session="s", num_examples=1, task="t",
    ...     heartbeat_s=2.0, state="training", round=3, step=2, steps=8))
    'training for round 3, step 2 of 8'
    """
    steps = f", step {message.step} of {message.steps}" if message.steps else ""
    if not message.round:
        return message.state + steps
    preposition = "after" if message.state == "idle" else "for"
    return f"{message.state} {preposition} round {message.round}{steps}"
