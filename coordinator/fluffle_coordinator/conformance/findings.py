"""What a conformance check demands, and what it found: pure data, and the judgements on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from fluffle_common.protocol.messages import Bye, Failure, Heartbeat, Hello, Update
from fluffle_coordinator.machine.state import Rules

Outcome = Literal["ok", "failed", "skipped"]
SignOfLife = Hello | Heartbeat | Bye | Failure


class Unmet(Exception):
    """The worker did something else than the document demands; the text says what was seen."""


class Skipped(Exception):
    """A scenario does not apply to this worker; the text says why."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one scenario.

    Args:
        scenario: its name.
        outcome: ``ok``, ``failed`` or ``skipped``.
        seen: what the worker did, or why nothing was tried.
        demand: what the document demands.
        section: the heading in docs/protocol.md under which it does.
    """

    scenario: str
    outcome: Outcome
    seen: str
    demand: str
    section: str

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


class Sign(NamedTuple):
    """A sign of life, and when it came: seconds of any monotonic clock."""

    at: float
    message: SignOfLife


def check_rhythm(signs: Sequence[Sign], now: float) -> str:
    """Check that a worker was never silent for so long that it would count as gone.

    Returns:
        What was seen, in words.

    Raises:
        Unmet: naming the longest silence.
    """
    beats = [
        (one.message.heartbeat_s, one.at)
        for one in signs
        if isinstance(one.message, Hello | Heartbeat)
    ]
    if not beats:
        raise Unmet("no sign of life came at all")
    every_s = max(heartbeat_s for heartbeat_s, _ in beats)
    times = [*(at for _, at in beats), now]
    longest_s = max(later - earlier for earlier, later in pairwise(times))
    told = f"{len(beats)} signs of life, every {every_s:g} s announced"
    if longest_s > Rules.patience * every_s:
        raise Unmet(f"{told}, and none for {longest_s:.1f} s")
    return f"{told}, the longest silence {longest_s:.1f} s"


class Taken(NamedTuple):
    """An update and its payload, once all of it is there."""

    update: Update
    payload: memoryview


def same_answer(one: Taken, other: Taken) -> bool:
    """Whether two updates are the same answer; ``seconds`` tells a second training apart.

    What belongs to the journey alone does not count: a payload in parts travels under a new id.
    """
    headers = [each.update.model_dump(exclude={"transfer", "pad"}) for each in (one, other)]
    return headers[0] == headers[1] and one.payload == other.payload


def at_work_on(message: Hello | Heartbeat) -> str:
    """Say in words what a worker says that it does.

    >>> at_work_on(Heartbeat(federation="f", worker="w", session="s", num_examples=1, task="t",
    ...     heartbeat_s=2.0, state="training", round=3, step=2, steps=8))
    'training for round 3, step 2 of 8'
    """
    steps = f", step {message.step} of {message.steps}" if message.steps else ""
    of = f" {'after' if message.state == 'idle' else 'for'} round {message.round}"
    return f"{message.state}{of if message.round else ''}{steps}"
