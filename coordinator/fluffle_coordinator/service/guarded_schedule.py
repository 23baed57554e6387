"""A user's schedule or rule of selection, called with care: what it does wrong ends the run.

Nothing is acknowledged before its round is on disk, so that a run which ends here loses nothing.
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
    """A schedule; every method raises ``TaskError`` for what the schedule does wrong.

    Args:
        name: what it is called.
        schedule: the schedule.
        max_staleness: as the schedule has it.
        continuous: as the schedule has it.
    """

    name: str
    schedule: Schedule[State]
    max_staleness: int = 0
    continuous: bool = False

    def discount(self, staleness: int) -> float:
        """See ``Schedule``; a part is from 0 to 1."""
        found = self._number("discount()", self.schedule.discount, staleness)
        if not 0 <= found <= 1:
            raise self._wrong("discount()", f"it returned {found!r}, not a number from 0 to 1")
        return found

    def needed(self, state: State) -> int:
        """See ``Schedule``."""
        found = self._number("needed()", self.schedule.needed, state)
        if found < 1 or found != int(found):
            raise self._wrong("needed()", f"it returned {found!r}, not a number from 1")
        return int(found)

    def cohort(self, state: State) -> tuple[str, ...]:
        """See ``Schedule``."""
        return self._workers("cohort()", self.schedule.cohort, state)

    def again(self, state: State) -> tuple[str, ...]:
        """See ``Schedule``."""
        answered = {ticket.worker for ticket in state.received}
        found = self._workers("again()", self.schedule.again, state)
        return tuple(name for name in found if name not in answered)

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """See ``Schedule``; whoever has work already gets no other."""
        found = self._workers("idle()", self.schedule.idle, state, worker)
        return tuple(name for name in found if name not in state.asked)

    def closes(self, state: State, now: float) -> bool:
        """See ``Schedule``."""
        return bool(_call(self._what, "closes()", self.schedule.closes, state, now))

    def wakeup(self, state: State) -> float:
        """See ``Schedule``."""
        return self._number("wakeup()", self.schedule.wakeup, state)

    @property
    def _what(self) -> str:
        return f"schedule {self.name}"

    def _wrong(self, where: str, why: str) -> TaskError:
        return _failed(self._what, where, why)

    def _number(self, where: str, function: Callable[..., Any], *on: Any) -> float:
        found = _call(self._what, where, function, *on)
        if not isinstance(found, int | float) or math.isnan(found):
            raise self._wrong(where, f"it returned {found!r:.60}, not a number")
        return found

    def _workers(
        self, where: str, function: Callable[..., Iterable[str]], state: State, *on: Any
    ) -> tuple[str, ...]:
        found = tuple(_call(self._what, where, function, state, *on))
        for name in found:
            if name not in state.workers:
                raise self._wrong(where, f"it named {name!r:.60}, but no such worker is connected")
        return tuple(dict.fromkeys(found))


def guarded_choice(name: str, choose: Choose) -> Choose:
    """Return a rule of selection that raises ``TaskError`` where a user's raises anything."""

    def guarded(candidates: Sequence[Candidate], count: int, draw: Draw) -> tuple[str, ...]:
        return tuple(_call(f"selection {name}", "its call", choose, candidates, count, draw))

    return guarded
