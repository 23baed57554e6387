"""The workers of a run: what each does now, and what it has done. Pure; a part of ``RunView``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent

_MOST = 10_000  # many more than take part; names are for whoever joins to choose

STATES = ("idle", "receiving", "evaluating", "training", "sending")
ABSENT = ("left", "gone", "refused")
Departure = run_events.Left | run_events.Gone
_SHOWS_ITSELF = (
    run_events.Joined, run_events.Counted, run_events.Refused, run_events.Init, Departure,
)  # fmt: skip


@dataclass
class WorkerView:
    """One worker.

    ``state`` is one of ``STATES``, or of ``ABSENT`` when it is not here. ``joined`` says whether
    the coordinator of the moment has taken it in, and ``went`` when and how it has departed since.
    """

    name: str
    state: str = "idle"
    why: str = ""
    joined: bool = False
    went: tuple[float, Departure] | None = None
    num_examples: int | None = None
    run: str | None = None
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
    train_s: float = 0.0  # of those of its updates that say it
    trained: int = 0  # how many say it

    @property
    def is_here(self) -> bool:
        """Whether it is connected, as far as is known."""
        return self.state not in ABSENT

    def count(self, num_examples: int | None, size: int | None, train_s: float | None) -> None:
        """Count an update of it."""
        self.counted += 1
        self.num_examples = num_examples or self.num_examples
        self.bytes += size or 0
        if train_s is not None:
            self.train_s += train_s
            self.trained += 1

    def doing(self, current: int, failed: str | None = None) -> str:
        """Say what it does about the current round, in which it may have ``failed``."""
        if failed is not None:
            return f"failed: {failed}"
        if not self.is_here:
            words = {"left": "has left", "gone": "is gone", "refused": "was refused"}[self.state]
            return f"{words} ({self.why})" if self.why else words
        if self.state == "idle":
            return "idle" if self.round == current else "idle at its last heartbeat"
        steps = f" {self.step}/{self.steps}" if self.steps else ""
        behind = f" of round {self.round}" if self.round and self.round != current else ""
        return f"{self.state}{steps}{behind}"


class Workers:
    """Every worker that was heard of, the longest absent forgotten first when they are too many.

    Only a worker that showed itself, or that was counted, gets a row: the name in a message that
    was refused may be anything.
    """

    def __init__(self) -> None:
        self._rows: dict[str, WorkerView] = {}

    def __getitem__(self, name: str) -> WorkerView:
        """Return a worker, which is new when it was not heard of."""
        known = self._rows.get(name)
        if known is None:
            if len(self._rows) >= _MOST:
                forgotten = min(
                    self._rows.values(), key=lambda row: (row.is_here, row.last_seen or 0.0)
                )
                del self._rows[forgotten.name]
            known = self._rows[name] = WorkerView(name)
        return known

    def get(self, name: str) -> WorkerView | None:
        """Return a worker; None when it was not heard of."""
        return self._rows.get(name)

    def add(self, at: float, event: RunEvent) -> None:
        """Take an event in, when it is about a worker."""
        name: str | None = getattr(event, "worker", None)
        if name is None or (name not in self._rows and not isinstance(event, _SHOWS_ITSELF)):
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
            case run_events.Left() | run_events.Gone() | run_events.Refused():
                if not isinstance(event, run_events.Refused):
                    row.joined, row.went = False, (at, event)
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
        row.joined, row.went = True, None
        if not row.is_here:
            row.state, row.why = "idle", ""

    def sign_of_life(self, seen_at: float, worker: str, message: Mapping[str, Any]) -> None:
        """Take in a hello or a heartbeat: ``message`` has the fields of the message."""
        row = self[worker]
        state = message.get("state")
        row.state = state if state in STATES else "idle"
        row.last_seen = seen_at
        row.num_examples = message.get("num_examples", row.num_examples)
        row.run, row.round = message.get("run"), message.get("round", 0)
        row.step, row.steps = message.get("step", 0), message.get("steps", 0)
        row.loss, row.heartbeat_s = message.get("loss"), message.get("heartbeat_s")

    def remember(self, name: str) -> WorkerView:
        """Return a worker of a history; until it is heard of, it is not here."""
        known = self._rows.get(name)
        if known is None:
            known = self[name]
            known.state = "gone"
        return known

    def another_run(self) -> None:
        """Begin to count again."""
        for row in self._rows.values():
            row.counted = row.late = row.rejected = row.bytes = row.trained = 0
            row.train_s = 0.0

    def another_coordinator(self) -> None:
        """Take in that a coordinator has started: it knows of nobody yet."""
        for row in self._rows.values():
            row.joined, row.went = False, None

    @property
    def present(self) -> set[str]:
        """Those that the coordinator of the moment has taken in and that have not departed."""
        return {name for name, row in self._rows.items() if row.joined}

    @property
    def absent(self) -> dict[str, tuple[float, Departure]]:
        """Those that have departed: when, and how."""
        return {name: row.went for name, row in self._rows.items() if row.went is not None}

    def in_order(self) -> list[WorkerView]:
        """Return all: whoever is here first, then by name."""
        return sorted(self._rows.values(), key=lambda row: (not row.is_here, row.name))

    def by_state(self) -> dict[str, int]:
        """Count the workers in each state; every state is there."""
        counts = dict.fromkeys((*STATES, *ABSENT), 0)
        for row in self._rows.values():
            counts[row.state] += 1
        return counts


def clipped(text: Any, most: int) -> str:
    """Return a text of at most ``most`` characters.

    Example:
        >>> clipped("a long story", 6), clipped(None, 6)
        ('a lon…', '')
    """
    words = "" if text is None else str(text)
    return words if len(words) <= most else words[: most - 1] + "…"
