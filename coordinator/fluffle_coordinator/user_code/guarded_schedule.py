"""Wraps a user's schedule or selection: any error or invalid result ends the run."""

from __future__ import annotations

import math
import numbers
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fluffle_common.errors import TaskError
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Candidate, Choose, Draw
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.user_code.calls import call_guarded, failed


@dataclass(frozen=True)
class GuardedSchedule:
    """A user's schedule; every method raises ``TaskError`` if the schedule fails.

    Its ``max_staleness`` and ``continuous`` were read when it was loaded.
    """

    name: str
    schedule: Schedule[State]
    max_staleness: int
    continuous: bool

    def __str__(self) -> str:
        """Return its name."""
        return self.name

    def discount(self, staleness: int) -> float:
        """Return ``Schedule.discount``, checked to be from 0 to 1, and above 0 if not stale."""
        discount = self._number("discount", staleness)
        if not staleness and not discount:
            raise self._failed("discount", "it returned 0 for the staleness 0, so no update counts")
        if not 0 <= discount <= 1:
            raise self._failed("discount", f"it returned {discount:g}, not a number from 0 to 1")
        return discount

    def needed(self, state: State) -> int:
        """Return ``Schedule.needed``, checked to be a whole number of at least 1."""
        needed = self._number("needed", state)
        if needed < 1 or not needed.is_integer():
            raise self._failed(
                "needed", f"it returned {needed:g}, not a whole number of at least 1"
            )
        return int(needed)

    def cohort(self, state: State) -> tuple[str, ...]:
        """Return ``Schedule.cohort``, checked to name connected workers."""
        return self._workers("cohort", state)

    def again(self, state: State) -> tuple[str, ...]:
        """Return ``Schedule.again`` without the workers that have answered in this round."""
        of_round = (ticket for ticket, one in state.received.items() if one.round == state.round)
        answered = {ticket.worker for ticket in of_round}
        return tuple(name for name in self._workers("again", state) if name not in answered)

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """Return ``Schedule.idle`` without the workers that have work already."""
        names = self._workers("idle", state, worker)
        return tuple(name for name in names if name not in state.asked)

    def closes(self, state: State, now: float) -> bool:
        """Return ``Schedule.closes`` as a bool."""
        closes = self._call("closes", state, now)
        return call_guarded(self._what, "closes()", bool, closes)  # an array's truth may fail

    def wakeup(self, state: State) -> float:
        """Return ``Schedule.wakeup``, checked to be a number."""
        return self._number("wakeup", state)

    @property
    def _what(self) -> str:
        return f"schedule {self.name}"

    def _failed(self, method: str, why: str) -> TaskError:
        return failed(self._what, f"{method}()", why)

    def _call(self, method: str, *on: Any) -> Any:
        return call_guarded(self._what, f"{method}()", getattr(self.schedule, method), *on)

    def _number(self, method: str, *on: Any) -> float:
        value = self._call(method, *on)
        try:
            number = float(value) if isinstance(value, numbers.Real) else math.nan
        except OverflowError:
            raise self._failed(method, "it returned a number above 1e308") from None
        if math.isnan(number):
            raise self._failed(method, f"it returned {value!r:.60}, not a number")
        return number

    def _workers(self, method: str, state: State, *on: Any) -> tuple[str, ...]:
        selected = self._call(method, state, *on)
        return _names(self._what, f"{method}()", selected, state.workers, "connected")


def guarded_choice(name: str, choose: Choose) -> Choose:
    """Wrap a user's selection function: any exception or invalid result is a ``TaskError``."""
    what, where = f"selection {name}", f"{name.rpartition(':')[2]}()"

    def guarded(candidates: Sequence[Candidate], count: int, draw: Draw) -> tuple[str, ...]:
        selected = call_guarded(what, where, choose, candidates, count, draw)
        known = {candidate.name for candidate in candidates}
        names = _names(what, where, selected, known, "among the candidates")
        if count and not names:
            raise failed(what, where, f"it selected none of the {len(known)} candidates")
        return names

    return guarded


def _names(
    what: str, where: str, selected: Any, known: Container[str], kind: str
) -> tuple[str, ...]:
    """Return the names that a user's function selected, each once; all must be ``known``."""
    if isinstance(selected, str) or not isinstance(selected, Iterable):
        raise failed(what, where, f"it returned {selected!r:.60}, not the names of workers")
    names: tuple[Any, ...] = call_guarded(what, where, tuple, selected)  # a generator may fail
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise failed(what, where, f"it selected {name!r:.60}, but no such worker is {kind}")
    return tuple(dict.fromkeys(names))
