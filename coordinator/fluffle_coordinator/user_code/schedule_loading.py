"""Loads the schedule and the selection that the options name, built in or from a user's file.

A user's is wrapped, so that any error or invalid result ends the run.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fluffle_common.cli.loading import Place
from fluffle_common.errors import TaskError, UsageError
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QUORUM, QuorumRounds
from fluffle_coordinator.machine.selection import (
    Candidate,
    Choose,
    Draw,
    Selection,
    parse_selection,
)
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.user_code.calls import call_guarded, check_object, failed, misfit

_METHODS = ("discount", "needed", "cohort", "again", "idle", "closes", "wakeup")
_LATE_ROUNDS = 2  # the default --max-staleness of --late discount


def load_schedule(
    name: str = "quorum",
    *,
    buffer: int | None = None,
    concurrency: int | None = None,
    max_staleness: int | None = None,
    staleness: Discount | None = None,
    late: str = "discard",
) -> Schedule[State]:
    """Return the schedule that ``--schedule`` names; ``str`` names it with its settings.

    The arguments are the options of ``fluffle coordinator``; None means that one was not given.

    Raises:
        UsageError: if there is no such schedule, or an option does not apply to it.
        TaskError: if a user's file fails to load.
    """
    if name not in ("quorum", "buffered") and ":" not in name:
        raise UsageError(
            f"unknown schedule '{name}' (--schedule); choose quorum or buffered, or load your own "
            "with path.py:name"
        )
    if name != "quorum" and late == "discount":
        raise UsageError(
            f"--late discount needs --schedule quorum, not {name}; remove --late or --schedule"
        )
    phi = staleness or POLYNOMIAL
    if name == "buffered":
        options = {"buffer": buffer, "concurrency": concurrency, "max_staleness": max_staleness}
        given = {option: value for option, value in options.items() if value is not None}
        return Buffered(phi=phi, **given)
    _refuse(
        {"--buffer": buffer, "--concurrency": concurrency},
        "needs --schedule buffered; add --schedule buffered, or remove",
    )
    stale = {"--max-staleness": max_staleness, "--staleness": staleness}
    if name != "quorum":
        _refuse(stale, "has no effect with your own schedule; remove")
        return _from_file(name)
    if late == "discard":
        _refuse(stale, "needs --schedule buffered or --late discount; add one of them, or remove")
        return QUORUM
    return QuorumRounds(_LATE_ROUNDS if max_staleness is None else max_staleness, phi)


def _refuse(options: dict[str, Any], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"{option} {why} {option}")


def load_selection(text: str) -> Selection:
    """Return the selection that ``--select`` names.

    Raises:
        ValueError: if there is no built-in selection of this name.
        UsageError: if the user's file has no such function.
        TaskError: if the user's file fails to load.
    """
    where, _, _ = text.rpartition(":")
    if not where or text.startswith("fastest:"):
        return parse_selection(text)
    place = Place.parse("select", text)
    function = place.load()
    if not callable(function) or isinstance(function, type):
        raise UsageError(
            f"--select {text} is not a function; give a function that takes (candidates, count, "
            "draw) and returns names of workers (docs/schedules.md)"
        )
    if wrong := misfit(function, "candidates", "count", "draw"):
        raise UsageError(
            f"--select {text} must be a function that accepts (candidates, count, draw) ({wrong})"
        )
    choose = guarded_choice(place.called, cast("Choose", function))
    return Selection(place.called, choose, fixed=False)


def _from_file(name: str) -> Schedule[State]:
    place = Place.parse("schedule", name)
    schedule = place.load()
    fields = check_object(
        Schedule, place.called, schedule, _METHODS, max_staleness=int, continuous=bool
    )
    max_staleness = fields["max_staleness"]
    if max_staleness < 0:
        raise UsageError(
            f"--schedule {name} has max_staleness = {max_staleness}; set max_staleness to at "
            "least 0 (with 0, only updates from the newest model are counted)"
        )
    return GuardedSchedule(place.called, schedule, max_staleness, fields["continuous"])


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
        """Return ``Schedule.again`` without the workers that have answered."""
        answered = {ticket.worker for ticket in state.received}
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
