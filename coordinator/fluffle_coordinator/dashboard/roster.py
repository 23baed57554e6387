"""The workers on the page: what each does now, and what it has done in this run. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent

_MOST = 2000

STATES = ("idle", "receiving", "evaluating", "training", "sending")
ABSENT = ("left", "gone", "refused")
_SHOWS_ITSELF = (run_events.Joined, run_events.Counted, run_events.Refused, run_events.Init)


@dataclass
class Row:
    """One worker. ``state`` is one of ``STATES``, or of ``ABSENT`` where it is not here."""

    name: str
    state: str = "idle"
    why: str = ""
    num_examples: int | None = None
    run: str | None = None
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    heartbeat_s: float | None = None
    last_seen: float | None = None
    counted: int = 0
    counted_round: int = 0
    late: int = 0
    rejected: int = 0
    failures: int = 0


class Roster:
    """Every worker that was heard of, the longest absent forgotten first where they are too many.

    Only a worker that showed itself, or that was counted, gets a row: the name in a message that
    was refused may be anything.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def add(self, at: float, event: RunEvent) -> None:
        """Take an event in, where it is about a worker."""
        name: str | None = getattr(event, "worker", None)
        if name is None:
            return
        row = self._rows.get(name)
        if row is None:
            if not isinstance(event, _SHOWS_ITSELF):
                return
            row = self._row(name)
        row.num_examples = getattr(event, "num_examples", None) or row.num_examples
        match event:
            case run_events.Joined():
                row.last_seen = max(at, row.last_seen or 0.0)
                row.state, row.why = "idle", ""
            case run_events.Counted():
                row.last_seen = max(at, row.last_seen or 0.0)
                if row.state in ABSENT:
                    row.state, row.why = "idle", ""
                row.counted += 1
                row.counted_round = event.round or row.counted_round
            case run_events.Left() | run_events.Gone() | run_events.Refused():
                if at >= (row.last_seen or 0.0):
                    reason = getattr(event, "reason", None)
                    row.state, row.why = event.name, clipped(reason or "", 300)
                    row.step = row.steps = 0
            case run_events.Late():
                row.late += 1
            case run_events.Rejected():
                row.rejected += 1
            case run_events.Failure():
                row.failures += 1
                row.why = clipped(event.reason or "", 300)

    def sign_of_life(self, seen_at: float, worker: str, message: Mapping[str, Any]) -> None:
        """Take in a hello or a heartbeat: ``message`` has the fields of the message."""
        row = self._rows.get(worker) or self._row(worker)
        state = message.get("state")
        row.state = state if state in STATES else "idle"
        row.last_seen = seen_at
        row.num_examples = message.get("num_examples", row.num_examples)
        row.run, row.round = message.get("run"), message.get("round", 0)
        row.step, row.steps, row.loss = (
            message.get("step", 0),
            message.get("steps", 0),
            message.get("loss"),
        )
        row.heartbeat_s = message.get("heartbeat_s")

    def remember(self, participants: Iterable[Mapping[str, Any]], number: int) -> None:
        """Take in who took part in an earlier round; until heard of, they are not here."""
        for one in participants:
            row = self._rows.get(one["worker"])
            if row is None:
                row = self._row(one["worker"])
                row.state = "gone"
            row.num_examples = one.get("num_examples", row.num_examples)
            row.counted += 1
            row.counted_round = number

    def another_run(self) -> None:
        """Begin to count again."""
        for row in self._rows.values():
            row.counted = row.counted_round = row.late = row.rejected = row.failures = 0

    def rows(self, current: int) -> list[dict[str, Any]]:
        """Return the workers as plain data: who is here first, then by name."""
        return [
            asdict(row) | {"doing": self.doing(row.name, current, None)}
            for row in sorted(self._rows.values(), key=lambda row: (row.state in ABSENT, row.name))
        ]

    def by_state(self) -> dict[str, int]:
        """Count the workers in each state; every state is there."""
        counts = dict.fromkeys((*STATES, *ABSENT), 0)
        for row in self._rows.values():
            counts[row.state] += 1
        return counts

    def doing(self, name: str, current: int, failed: str | None) -> str:
        """Say what a worker does about the current round."""
        row = self._rows.get(name)
        if failed is not None:
            return f"failed: {failed}"
        if row is None:
            return "not heard of yet"
        if row.state in ABSENT:
            return {"left": "has left", "gone": "is gone", "refused": "was refused"}[row.state] + (
                f" ({row.why})" if row.why else ""
            )
        if row.state == "idle":
            return "idle" if row.round == current else "idle at its last heartbeat"
        steps = f" {row.step}/{row.steps}" if row.steps else ""
        behind = f" of round {row.round}" if row.round and row.round != current else ""
        return f"{row.state}{steps}{behind}"

    def _row(self, name: str) -> Row:
        if len(self._rows) >= _MOST:
            victims = sorted(
                self._rows.values(), key=lambda r: (r.state not in ABSENT, r.last_seen or 0.0)
            )
            del self._rows[victims[0].name]
        return self._rows.setdefault(name, Row(name))


def clipped(text: Any, most: int) -> str:
    """Return a text of at most ``most`` characters.

    Example:
        >>> clipped("a long story", 6)
        'a lon…'
    """
    told = str(text)
    return told if len(told) <= most else told[: most - 1] + "…"
