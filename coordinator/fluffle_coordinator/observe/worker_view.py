"""What each worker of a run is doing and has done. Pure; part of ``RunView``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.messages import Heartbeat, Hello
from fluffle_coordinator.machine.records import Worker

_MAX_WORKERS = 10_000  # a bound, since anyone who joins can choose new names

STATES = ("idle", "receiving", "evaluating", "training", "sending")
ABSENT = ("left", "gone", "refused")
Departure = run_events.Left | run_events.Gone
# The events that create a row; the worker named in any other may not exist.
_OF_REAL_WORKERS = (
    run_events.Joined, run_events.Counted, run_events.Refused, run_events.Init, Departure,
)  # fmt: skip


@dataclass
class WorkerView:
    """What is known of a worker.

    ``state`` is one of ``STATES``, or of ``ABSENT`` if it is not connected. ``joined`` says whether
    the current coordinator has admitted it, and ``departed`` when and how it has departed since.
    """

    name: str
    state: str = "idle"
    why: str = ""
    joined: bool = False
    departed: tuple[float, Departure] | None = None
    num_examples: int | None = None
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    heartbeat_s: float | None = None
    last_seen: float | None = None
    counted: int = 0
    late: int = 0
    rejected: int = 0
    bytes: int = 0
    train_s: float = 0.0  # the sum over the updates that report a training time
    trained: int = 0  # the number of those updates

    @property
    def is_here(self) -> bool:
        """Whether it is connected, according to the latest event."""
        return self.state not in ABSENT

    def count(self, num_examples: int | None, size: int | None, train_s: float | None) -> None:
        """Count one of its updates."""
        self.counted += 1
        self.num_examples = num_examples or self.num_examples
        self.bytes += size or 0
        if train_s is not None:
            self.train_s += train_s
            self.trained += 1

    def doing(self, current: int, failed: str | None = None) -> str:
        """Return in words what the worker is doing.

        ``current`` is the open round, and ``failed`` the reason why it failed in that, if it did.
        """
        if failed is not None:
            return f"failed: {failed}"
        if not self.is_here:
            words = {"left": "has left", "gone": "is gone", "refused": "was refused"}[self.state]
            return f"{words} ({self.why})" if self.why else words
        if self.state == "idle":
            return "idle" if self.round == current else "idle at its last heartbeat"
        steps = f" {self.step}/{self.steps}" if self.steps else ""
        behind = f" for round {self.round}" if self.round and self.round != current else ""
        return f"{self.state}{steps}{behind}"


class Workers(dict[str, WorkerView]):
    """All known workers by name; beyond a limit, the one absent for longest is forgotten.

    Only workers that joined, or whose updates were counted, get a row, because a rejected message
    may contain any name.
    """

    def __missing__(self, name: str) -> WorkerView:
        """Return a new row, for a worker that is unknown."""
        if len(self) >= _MAX_WORKERS:
            forgotten = min(self.values(), key=lambda row: (row.is_here, row.last_seen or 0.0))
            del self[forgotten.name]
        row = self[name] = WorkerView(name)
        return row

    def add(self, at: float, event: RunEvent) -> None:
        """Apply an event; those that name no worker change nothing."""
        name: str | None = getattr(event, "worker", None)
        if name is None or (name not in self and not isinstance(event, _OF_REAL_WORKERS)):
            return
        row = self[name]
        match event:
            case run_events.Joined(num_examples=examples):
                row.num_examples = examples or row.num_examples
                self._appear(row, at)
                row.state, row.why = "idle", ""
            case run_events.Counted():
                self._appear(row, at)
                row.count(event.num_examples, event.bytes, event.train_s)
                row.why = ""  # an earlier failure
            case run_events.Left() | run_events.Gone() | run_events.Refused():
                if not isinstance(event, run_events.Refused):
                    row.joined, row.departed = False, (at, event)
                if at >= (row.last_seen or 0.0):
                    row.state, row.why = event.name, clipped(getattr(event, "reason", ""), 300)
                    row.step = row.steps = 0
            case run_events.Late():
                row.late += 1
            case run_events.Rejected():
                row.rejected += 1
            case run_events.Failure(reason=reason):
                row.why = clipped(reason, 300)

    def _appear(self, row: WorkerView, at: float) -> None:
        row.last_seen = max(at, row.last_seen or 0.0)
        row.joined, row.departed = True, None
        if not row.is_here:
            row.state, row.why = "idle", ""

    def sign_of_life(self, seen_at: float, name: str, sign: Hello | Heartbeat | Worker) -> None:
        """Apply what a worker reports of itself, which arrived at ``seen_at``."""
        row = self[name]
        row.state, row.num_examples, row.last_seen = sign.state, sign.num_examples, seen_at
        row.round, row.step, row.steps = sign.round, sign.step, sign.steps
        row.loss, row.heartbeat_s = sign.loss, sign.heartbeat_s

    def remember(self, name: str) -> WorkerView:
        """Return the row of a worker that the history names; a new row begins as gone."""
        if name not in self:
            self[name].state = "gone"
        return self[name]

    def begin_coordinator(self, at: float) -> None:
        """Count everyone as gone until heard again, since a new coordinator knows no worker yet.

        A worker that died while no coordinator was there is not reported by any event.
        """
        for row in self.values():
            row.joined, row.departed = False, None
            if row.is_here and at >= (row.last_seen or 0.0):
                row.state, row.why, row.step, row.steps = "gone", "", 0, 0

    @property
    def present(self) -> set[str]:
        """The workers that the current coordinator has admitted and that have not departed."""
        return {name for name, row in self.items() if row.joined}

    @property
    def departed(self) -> dict[str, tuple[float, Departure]]:
        """When and how each absent worker has departed."""
        return {name: row.departed for name, row in self.items() if row.departed is not None}

    def in_order(self) -> list[WorkerView]:
        """Return all rows, connected workers first, then by name."""
        return sorted(self.values(), key=lambda row: (not row.is_here, row.name))

    def by_state(self) -> dict[str, int]:
        """Return the number of workers in each state, including states without any."""
        counts = dict.fromkeys((*STATES, *ABSENT), 0)
        for row in self.values():
            counts[row.state] += 1
        return counts


def clipped(text: Any, most: int) -> str:
    """Return a text, cut to at most ``most`` characters.

    Example:
        >>> clipped("a long story", 6), clipped(None, 6)
        ('a lon…', '')
    """
    words = "" if text is None else str(text)
    return words if len(words) <= most else words[: most - 1] + "…"
