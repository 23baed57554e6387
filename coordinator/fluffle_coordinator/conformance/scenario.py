"""A scenario: one demand of docs/protocol.md, and how to see whether a worker meets it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fluffle_coordinator.conformance.probe import Probe

Play = Callable[[Probe], Awaitable[str]]
"""Plays it; returns what was seen, or raises ``Unmet`` or ``Skipped``."""

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
    """See above.

    Args:
        name: in a few words.
        section: the heading in docs/protocol.md under which the demand stands.
        demand: what a worker has to do.
        play: how to see it.
        needed: if it is not met, nothing further can be tried.
    """

    name: str
    section: str
    demand: str
    play: Play
    needed: bool = False


def demands(section: str, demand: str, *, needed: bool = False) -> Callable[[Play], Scenario]:
    """Make a scenario of a function, named like it."""

    def made(play: Play) -> Scenario:
        name = getattr(play, "__name__", "").replace("_", " ")
        return Scenario(name, section, demand, play, needed)

    return made
