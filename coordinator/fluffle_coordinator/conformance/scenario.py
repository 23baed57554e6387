"""A scenario: one demand of docs/protocol.md, and the test of whether a worker meets it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fluffle_coordinator.conformance.probe import Probe

Play = Callable[[Probe], Awaitable[str]]
"""Plays a scenario; returns what the worker did, or raises ``Unmet`` or ``Skipped``."""

LIFE = "The life of a worker"
FROM_COORDINATOR = "From the coordinator, in `F.inbox.W`"
TO_COORDINATOR = "To the coordinator, on `F.results`"
MESSAGE = "A message"
PARTS = "Large payloads"
OUTCOME = "What becomes of an update"
REFUSED = "What a worker refuses"
SECTIONS = (LIFE, FROM_COORDINATOR, TO_COORDINATOR, MESSAGE, PARTS, OUTCOME, REFUSED)


@dataclass(frozen=True)
class Scenario:
    """One scenario.

    Args:
        name: a few words that name it.
        section: the heading in docs/protocol.md under which the demand is.
        demand: what a worker has to do.
        play: the test.
        needed: whether no later scenario can be tried if this one fails.
    """

    name: str
    section: str
    demand: str
    play: Play
    needed: bool = False


def demands(section: str, demand: str, *, needed: bool = False) -> Callable[[Play], Scenario]:
    """Return a decorator that makes a scenario of a function and names it after that."""

    def decorate(play: Play) -> Scenario:
        name = getattr(play, "__name__", "").replace("_", " ")
        return Scenario(name, section, demand, play, needed)

    return decorate
