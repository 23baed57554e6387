"""Loads the schedule and the selection that the options name, built in or from a user's file."""

from __future__ import annotations

from typing import Any, cast

from fluffle_common.cli.loading import Place
from fluffle_common.errors import UsageError
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QUORUM, QuorumRounds
from fluffle_coordinator.machine.selection import Choose, Selection, parse_selection
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.user_code.calls import check_object, misfit
from fluffle_coordinator.user_code.guarded_schedule import GuardedSchedule, guarded_choice

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
