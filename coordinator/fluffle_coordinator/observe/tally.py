"""What is counted of a federation since it is watched, or since its journal begins. Pure.

It never goes down, whatever run the events are of: that is how Prometheus wants it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fluffle_common.errors import CAUSES
from fluffle_common.protocol import events as run_events

OUTCOMES = ("counted", "late", "rejected", "duplicate")
STEPS = ("waiting", "open", "fold", "average", "checkpoint")
"""The parts of a round's time, as ``timings`` of a committed round names them (``<step>_s``)."""


@dataclass
class Tally:
    """The counts. ``outcomes`` are of updates, ``causes`` of all rejected messages."""

    rounds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    outages: int = 0
    update_bytes: int = 0
    step_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    step_rounds: Counter[str] = field(default_factory=Counter)
    committed_at: float | None = None

    def add(self, at: float, event: run_events.RunEvent) -> None:
        """Take an event in."""
        match event:
            case run_events.Counted(bytes=size):
                self.outcomes[event.name] += 1
                self.update_bytes += size or 0
            case run_events.Late() | run_events.Duplicate():
                self.outcomes[event.name] += 1
            case run_events.Rejected(kind=kind):
                self.causes[cause_of(event)] += 1
                if kind in (None, "update"):  # what cannot be read at all may have been one
                    self.outcomes[event.name] += 1
            case run_events.Failure():
                self.failures += 1
            case run_events.Disconnected():
                self.outages += 1
            case run_events.Committed(timings=timings):
                self.rounds += 1
                self.committed_at = at
                for step, seconds in step_times(timings or {}).items():
                    self.step_seconds[step] += seconds
                    self.step_rounds[step] += 1


def cause_of(event: run_events.Rejected) -> str:
    """Return why a message was rejected, as one of ``CAUSES``."""
    return event.cause if event.cause in CAUSES else "malformed"


def step_times(timings: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each of ``STEPS`` that the timings of a round have."""
    return {step: float(timings[f"{step}_s"]) for step in STEPS if f"{step}_s" in timings}
