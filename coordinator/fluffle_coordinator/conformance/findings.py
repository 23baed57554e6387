"""The findings of a conformance check, and pure functions that judge a worker's messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from fluffle_common.protocol.messages import Bye, Failure, Heartbeat, Hello, Update
from fluffle_coordinator.machine.state import Rules

Outcome = Literal["ok", "failed", "skipped"]
PresenceMessage = Hello | Heartbeat | Bye | Failure


class Unmet(Exception):
    """The worker does not meet a demand; the text says what it did."""


class Skipped(Exception):
    """A scenario cannot be tried with this worker; the text says why."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one scenario.

    Args:
        scenario: the name of the scenario.
        outcome: ``ok``, ``failed`` or ``skipped``.
        seen: what the worker did, or why the scenario was skipped.
        demand: what docs/protocol.md demands.
        section: the section of that document.
    """

    scenario: str
    outcome: Outcome
    seen: str
    demand: str
    section: str

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as plain data, for JSON."""
        return asdict(self)


class Heard(NamedTuple):
    """A presence message and the time of its arrival, in seconds of a monotonic clock."""

    at: float
    message: PresenceMessage


def check_rhythm(presence: Sequence[Heard], now: float) -> str:
    """Check that a worker was never silent for so long that it would count as gone.

    Returns:
        A summary for people.

    Raises:
        Unmet: if the worker was silent for too long.
    """
    beats = [
        (each.message.heartbeat_s, each.at)
        for each in presence
        if isinstance(each.message, Hello | Heartbeat)
    ]
    if not beats:
        raise Unmet("no heartbeat came")
    every_s = max(heartbeat_s for heartbeat_s, _ in beats)
    times = [*(at for _, at in beats), now]
    longest_s = max(later - earlier for earlier, later in pairwise(times))
    summary = f"{len(beats)} heartbeats, one every {every_s:g} s announced"
    if longest_s > Rules.patience * every_s:
        raise Unmet(f"{summary}, and none for {longest_s:.1f} s")
    return f"{summary}, the longest silence {longest_s:.1f} s"


class ReceivedUpdate(NamedTuple):
    """An update with its complete payload."""

    update: Update
    payload: memoryview


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
