"""How a schedule is found: by its name and options, or as an object in a user's own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from fluffle_common.cli.loading import Place
from fluffle_common.errors import UsageError
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QuorumRounds
from fluffle_coordinator.machine.selection import Choose, Selection, parse_selection
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.service.guarded_schedule import GuardedSchedule, guarded_choice

_METHODS = ("discount", "needed", "cohort", "again", "idle", "closes", "wakeup")
_CALLERS = frozenset({__file__})
_LATE_ROUNDS = 2  # of so many rounds late updates count, unless --max-staleness says otherwise


@dataclass(frozen=True)
class Timing:
    """What the options say of how rounds follow each other; None: not given.

    Args:
        schedule: ``quorum``, ``buffered`` or ``path.py:name``.
        buffer: how many updates make a version.
        concurrency: how many workers train at a time at most.
        max_staleness: how many versions old an update may be.
        staleness: what part of its weight a stale update keeps.
        late: what becomes of late updates of synchronous rounds.
    """

    schedule: str = "quorum"
    buffer: int | None = None
    concurrency: int | None = None
    max_staleness: int | None = None
    staleness: Discount | None = None
    late: str = "discard"


def load_schedule(timing: Timing) -> tuple[str, Schedule[State]]:
    """Return the schedule that the options name, and what it is called with its settings.

    Raises:
        UsageError: where there is no such thing, or an option does not go with it.
        TaskError: where a user's own code fails while it is loaded.
    """
    name = timing.schedule
    stale = {"--max-staleness": timing.max_staleness, "--staleness": timing.staleness}
    buffered = {"--buffer": timing.buffer, "--concurrency": timing.concurrency}
    if name == "buffered":
        return _buffered(timing)
    _refuse(buffered, "goes with --schedule buffered")
    discounts = timing.late == "discount"
    if name == "quorum":
        if not discounts:
            _refuse(stale, "goes with --schedule buffered or --late discount")
            return name, QuorumRounds()
        oldest = _LATE_ROUNDS if timing.max_staleness is None else timing.max_staleness
        phi = timing.staleness or POLYNOMIAL
        told = f"quorum:late=discount,max_staleness={oldest},staleness={phi}"
        return told, QuorumRounds(max_staleness=oldest, phi=phi)
    _refuse(stale, "is for fluffle's own schedules; your schedule decides this itself")
    _refuse({"--late discount": discounts or None}, "goes with --schedule quorum")
    if ":" not in name:
        raise UsageError(
            f"there is no schedule '{name}' (--schedule); quorum and buffered are known, and "
            "path.py:name takes one from a file of your own"
        )
    return _of_a_file(name)


def _buffered(timing: Timing) -> tuple[str, Buffered]:
    _refuse({"--late discount": timing.late == "discount" or None}, "goes with --schedule quorum")
    found = Buffered(concurrency=timing.concurrency, phi=timing.staleness or POLYNOMIAL)
    found = Buffered(
        found.buffer if timing.buffer is None else timing.buffer,
        found.concurrency,
        found.max_staleness if timing.max_staleness is None else timing.max_staleness,
        found.phi,
    )
    most = "" if found.concurrency is None else f",concurrency={found.concurrency}"
    return (
        f"buffered:buffer={found.buffer}{most},max_staleness={found.max_staleness},"
        f"staleness={found.phi}",
        found,
    )


def _refuse(options: dict[str, Any], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"{option} {why}; leave it out, or name that")


def load_selection(text: str) -> Selection:
    """Return the rule of selection that ``--select`` names.

    Raises:
        ValueError: where there is none of this name.
        UsageError: where a user's file has none.
        TaskError: where a user's own code fails while it is loaded.
    """
    where, _, _ = text.rpartition(":")
    if not where or text.startswith("fastest:"):
        return parse_selection(text)
    place = Place.parse("select", text)
    found = place.load(_CALLERS)
    if not callable(found) or isinstance(found, type):
        raise UsageError(
            f"--select {text} names no function; it is given the candidates, how many to choose "
            "and the draw, and returns their names (docs/schedules.md)"
        )
    return Selection(place.called, guarded_choice(place.called, cast("Choose", found)))


def _of_a_file(name: str) -> tuple[str, Schedule[State]]:
    place = Place.parse("schedule", name)
    found = place.found(_CALLERS)
    if isinstance(found, type):
        raise UsageError(
            f"--schedule {name} is a class, not a schedule; create an instance in the file, "
            "and name that"
        )
    missing = [f"{one}()" for one in _METHODS if not callable(getattr(found, one, None))]
    missing += [
        f"{one} ({kind.__name__})"
        for one, kind in (("max_staleness", int), ("continuous", bool))
        if not isinstance(getattr(found, one, None), kind)
    ]
    if missing:
        raise UsageError(
            f"--schedule {name} is not a schedule: this {type(found).__name__} lacks "
            f"{', '.join(missing)}; inherit from fluffle_coordinator.machine.schedule.Schedule"
        )
    return place.called, GuardedSchedule(place.called, found, found.max_staleness, found.continuous)
