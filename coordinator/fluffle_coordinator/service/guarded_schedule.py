"""Wraps a user's schedule or selection: any error or invalid result ends the run.

Ending the run loses nothing, because no update is acknowledged before its round is on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
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


def call_guarded(what: str, where: str, function: Callable[..., _T], *on: Any) -> _T:
    """Call a user's function.

    Args:
        what: what it belongs to, such as ``schedule windows.py:minutes``.
        where: its name, for messages.
        function: the function.
        on: its arguments.

    Raises:
        TaskError: if it fails; the traceback goes to stderr.
    """
    try:
        return function(*on)
    except (Exception, SystemExit) as why:
        warn_in_full(why, what.partition(" ")[0], _CALLERS)
        raise _failed(what, where, one_line(why, _CALLERS)) from why


def _names(
    what: str, where: str, selected: Any, known: Container[str], kind: str
) -> tuple[str, ...]:
    """Return the names of workers that a user's function selected, each once.

    Raises:
        TaskError: if they are not names, or one is not in ``known``, the workers of this kind.
    """
    if isinstance(selected, str) or not isinstance(selected, Iterable):
        raise _failed(what, where, f"it returned {selected!r:.60}, not the names of workers")
    names: tuple[Any, ...] = call_guarded(what, where, tuple, selected)  # a generator may fail
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise _failed(what, where, f"it selected {name!r:.60}, but no such worker is {kind}")
    return tuple(dict.fromkeys(names))


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
        """Return ``Schedule.discount``, checked to be from 0 to 1, and above 0 if not stale."""
        discount = self._number("discount()", self.schedule.discount, staleness)
        if not staleness and not discount:
            raise self._wrong("discount()", "it returned 0 for the staleness 0, so nothing counts")
        if not 0 <= discount <= 1:
            raise self._wrong("discount()", f"it returned {discount!r}, not a number from 0 to 1")
        return discount

    def needed(self, state: State) -> int:
        """Return ``Schedule.needed``, checked to be a whole number of at least 1."""
        needed = self._number("needed()", self.schedule.needed, state)
        if needed < 1 or needed % 1 != 0:
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
        return bool(call_guarded(self._what, "closes()", self.schedule.closes, state, now))

    def wakeup(self, state: State) -> float:
        """Return ``Schedule.wakeup``, checked to be a number."""
        return self._number("wakeup()", self.schedule.wakeup, state)

    @property
    def _what(self) -> str:
        return f"schedule {self.name}"

    def _wrong(self, where: str, why: str) -> TaskError:
        return _failed(self._what, where, why)

    def _number(self, where: str, function: Callable[..., Any], *on: Any) -> float:
        value = call_guarded(self._what, where, function, *on)
        if not isinstance(value, int | float) or math.isnan(value):
            raise self._wrong(where, f"it returned {value!r:.60}, not a number")
        return value

    def _workers(
        self, where: str, function: Callable[..., Iterable[str]], state: State, *on: Any
    ) -> tuple[str, ...]:
        selected = call_guarded(self._what, where, function, state, *on)
        return _names(self._what, where, selected, state.workers, "connected")


def guarded_choice(name: str, choose: Choose) -> Choose:
    """Wrap a user's selection function: any exception or invalid result is a ``TaskError``."""
    what, where = f"selection {name}", f"{name.rpartition(':')[2]}()"

    def guarded(candidates: Sequence[Candidate], count: int, draw: Draw) -> tuple[str, ...]:
        selected = call_guarded(what, where, choose, candidates, count, draw)
        known = {candidate.name for candidate in candidates}
        names = _names(what, where, selected, known, "among the candidates")
        if count and not names:
            raise _failed(what, where, f"it selected none of the {len(known)} candidates")
        return names

    return guarded
