"""Counters of a federation, from the first event seen and across runs. Pure.

They never decrease, as Prometheus requires of counters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fluffle_common.errors import CAUSES
from fluffle_common.protocol import events as run_events

OUTCOMES = ("counted", "late", "rejected", "duplicate")
STEPS = ("waiting", "open", "fold", "average", "checkpoint")
"""The steps of a round; the ``timings`` of a committed round call them ``<step>_s``."""


@dataclass
class Counters:
    """The counters; ``outcomes`` counts updates, ``causes`` counts all rejected messages."""

    rounds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    outages: int = 0
    update_bytes: int = 0
    step_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    step_rounds: Counter[str] = field(default_factory=Counter)

    def add(self, event: run_events.RunEvent) -> None:
        """Count an event."""
        match event:
            case run_events.Counted(bytes=size):
                self.outcomes[event.name] += 1
                self.update_bytes += size or 0
            case run_events.Late() | run_events.Duplicate():
                self.outcomes[event.name] += 1
            case run_events.Rejected(kind=kind):
                self.causes[cause_of(event)] += 1
                if kind in (None, "update"):  # a message that cannot be decoded may be an update
                    self.outcomes[event.name] += 1
            case run_events.Failure():
                self.failures += 1
            case run_events.Disconnected():
                self.outages += 1
            case run_events.Committed(timings=timings):
                self.rounds += 1
                for step in STEPS:
                    if timings and f"{step}_s" in timings:
                        self.step_seconds[step] += timings[f"{step}_s"]
                        self.step_rounds[step] += 1


def cause_of(event: run_events.Rejected) -> str:
    """Return the cause of a rejection; ``malformed`` if it is not one of ``CAUSES``."""
    return event.cause if event.cause in CAUSES else "malformed"
