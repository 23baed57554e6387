"""A scenario: one requirement of docs/protocol.md, and the test of whether a worker meets it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.received import Skipped, Unmet

Play = Callable[[Probe], Awaitable[str]]
"""Plays a scenario; returns what the worker did, or raises ``Unmet`` or ``Skipped``."""

Outcome = Literal["ok", "failed", "skipped"]


class Finding(NamedTuple):
    """The outcome of one scenario.

    ``seen`` says what the worker did, or why the scenario was skipped; ``requirement`` and
    ``section`` are from docs/protocol.md.
    """

    scenario: str
    outcome: Outcome
    seen: str
    requirement: str
    section: str


@dataclass(frozen=True)
class Scenario:
    """A requirement in a section of docs/protocol.md, and the test of it.

    If it is ``needed`` and not met, no later scenario can be tried.
    """

    name: str
    section: str
    requirement: str
    play: Play
    needed: bool

    async def finding(self, probe: Probe) -> Finding:
        """Play the scenario and return its outcome."""
        try:
            return self.found("ok", await self.play(probe))
        except Unmet as why:
            return self.found("failed", str(why))
        except Skipped as why:
            return self.found("skipped", str(why))

    def found(self, outcome: Outcome, seen: str) -> Finding:
        """Return a finding of this scenario."""
        return Finding(self.name, outcome, seen, self.requirement, self.section)


def requires(section: str, requirement: str, *, needed: bool = False) -> Callable[[Play], Scenario]:
    """Return a decorator that makes a scenario of a function and names it after that."""

    def decorate(play: Play) -> Scenario:
        name = getattr(play, "__name__", "").replace("_", " ")
        return Scenario(name, section, requirement, play, needed)

    return decorate
