"""Wraps a user's schedule or selection: any error or invalid result ends the run.

Ending the run loses nothing, because no update is acknowledged before its round is on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fluffle_common.cli.user_code import one_line, warn_in_full
from fluffle_common.errors import TaskError
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Candidate, Choose, Draw
from fluffle_coordinator.machine.state import State

_T = TypeVar("_T")
_CALLERS = frozenset({__file__})


def _failed(what: str, where: str, why: str) -> TaskError:
    return TaskError(
        f"the {what} failed in {where}: {why}; fix it and run the same command again: no update is "
        "lost"
    )


def _call(what: str, where: str, function: Callable[..., _T], *on: Any) -> _T:
    try:
        return function(*on)
    except (Exception, SystemExit) as why:
        warn_in_full(why, what.partition(" ")[0], _CALLERS)
        raise _failed(what, where, one_line(why)) from why


@dataclass(frozen=True)
class GuardedSchedule(Schedule[State]):
    """A user's schedule; every method raises ``TaskError`` if the schedule fails.

    Args:
        name: the schedule's name, for messages.
        schedule: the user's schedule.
        max_staleness: ``schedule.max_staleness``.
        continuous: ``schedule.continuous``.
    """

    name: str
    schedule: Schedule[State]
    max_staleness: int = 0
    continuous: bool = False

    def discount(self, staleness: int) -> float:
        """Return ``Schedule.discount``, checked to be from 0 to 1."""
        discount = self._number("discount()", self.schedule.discount, staleness)
        if not 0 <= discount <= 1:
            raise self._wrong("discount()", f"it returned {discount!r}, not a number from 0 to 1")
        return discount

    def needed(self, state: State) -> int:
        """Return ``Schedule.needed``, checked to be a whole number of at least 1."""
        needed = self._number("needed()", self.schedule.needed, state)
        if needed < 1 or needed != int(needed):
            raise self._wrong(
                "needed()", f"it returned {needed!r}, not a whole number of at least 1"
            )
        return int(needed)

    def cohort(self, state: State) -> tuple[str, ...]:
        """Return ``Schedule.cohort``, checked to name connected workers."""
        return self._workers("cohort()", self.schedule.cohort, state)

    def again(self, state: State) -> tuple[str, ...]:
        """Return ``Schedule.again`` without the workers that have answered."""
        answered = {ticket.worker for ticket in state.received}
        names = self._workers("again()", self.schedule.again, state)
        return tuple(name for name in names if name not in answered)

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """Return ``Schedule.idle`` without the workers that have work already."""
        names = self._workers("idle()", self.schedule.idle, state, worker)
        return tuple(name for name in names if name not in state.asked)

    def closes(self, state: State, now: float) -> bool:
        """Return ``Schedule.closes`` as a bool."""
        return bool(_call(self._what, "closes()", self.schedule.closes, state, now))

    def wakeup(self, state: State) -> float:
        """Return ``Schedule.wakeup``, checked to be a number."""
        return self._number("wakeup()", self.schedule.wakeup, state)

    @property
    def _what(self) -> str:
        return f"schedule {self.name}"

    def _wrong(self, where: str, why: str) -> TaskError:
        return _failed(self._what, where, why)

    def _number(self, where: str, function: Callable[..., Any], *on: Any) -> float:
        value = _call(self._what, where, function, *on)
        if not isinstance(value, int | float) or math.isnan(value):
            raise self._wrong(where, f"it returned {value!r:.60}, not a number")
        return value

    def _workers(
        self, where: str, function: Callable[..., Iterable[str]], state: State, *on: Any
    ) -> tuple[str, ...]:
        names = tuple(_call(self._what, where, function, state, *on))
        for name in names:
            if name not in state.workers:
                raise self._wrong(
                    where, f"it selected {name!r:.60}, but no such worker is connected"
                )
        return tuple(dict.fromkeys(names))


def guarded_choice(name: str, choose: Choose) -> Choose:
    """Wrap a user's selection function so that any exception becomes a ``TaskError``."""

    def guarded(candidates: Sequence[Candidate], count: int, draw: Draw) -> tuple[str, ...]:
        return tuple(_call(f"selection {name}", "its call", choose, candidates, count, draw))

    return guarded
