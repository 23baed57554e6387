"""How a strategy is found: by its name, or as an object in a user's own file."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fluffle_common.cli.loading import Place
from fluffle_common.cli.user_code import one_line, warn_in_full
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.messages import Plan
from fluffle_coordinator.machine.state import Rules
from fluffle_coordinator.storage.run_store import Saved
from fluffle_coordinator.strategy.base import NamedStrategy, Needs, Strategy
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.strategy.scaffold import scaffold

_GROUP = "fluffle.strategies"
_METHODS = ("init", "broadcast", "fold", "finish", "dump", "load")
_CALLERS = frozenset({__file__})
_OWN = (FEDAVG, NamedStrategy("scaffold", scaffold()))


def load_strategy(name: str) -> NamedStrategy:
    """Find what ``--strategy`` names: a name, ``path.py:name`` or ``module:name``.

    Raises:
        UsageError: where there is no such thing, or it is no strategy.
        TaskError: where its own code fails while it is loaded.
    """
    for own in _OWN:
        if name == own.name:
            return own
    if ":" not in name:
        return NamedStrategy(name, _checked(name, _by_name(name)))
    place = Place.parse("strategy", name)
    found = place.load(_CALLERS)
    if found is None:
        raise UsageError(f"{place.where} has no '{place.attribute}' (--strategy)")
    strategy = _checked(name, found)
    if not place.is_file:
        return NamedStrategy(name, strategy)
    path = Path(place.where).resolve()
    return NamedStrategy(f"{path.name}:{place.attribute}", strategy, str(path))


def _by_name(name: str) -> Any:
    known = {own.name for own in _OWN}
    for point in entry_points(group=_GROUP):
        known.add(point.name)
        if point.name == name:
            try:
                return point.load()
            except (Exception, SystemExit) as why:
                warn_in_full(why, "strategy", _CALLERS)
                raise TaskError(
                    f"the strategy {name} of {point.value} fails to load: {one_line(why)}"
                ) from why
    raise UsageError(
        f"there is no strategy '{name}' (--strategy); known are {', '.join(sorted(known))}, and "
        "path.py:name takes one from a file of your own"
    )


def _checked(name: str, found: Any) -> Any:
    """Return a strategy that has all that one has.

    Raises:
        UsageError: naming what is missing.
    """
    attribute = name.rpartition(":")[2]
    if isinstance(found, type):
        raise UsageError(
            f"--strategy {name} is a class, not a strategy; make an object of it there, such as "
            f"my_{attribute.lower()} = {attribute}(), and name that"
        )
    missing = [f"{one}()" for one in _METHODS if not callable(getattr(found, one, None))]
    if not isinstance(getattr(found, "needs", None), Needs):
        missing.append("needs (a Needs object)")
    if missing:
        of = type(found).__name__
        hint = "; if it makes one, call it there and name what it returns" * (of == "function")
        raise UsageError(
            f"--strategy {name} is no strategy: this {of} lacks {', '.join(missing)}; pipeline() "
            f"makes one that has them{hint}"
        )
    return found


def check_needs(named: NamedStrategy, rules: Rules) -> None:
    """Check that a run of these rules gives a strategy what it needs.

    Raises:
        UsageError: naming what it does not get, and the remedy.
    """
    needs: Needs = named.strategy.needs
    not_yet = {
        "all updates of a round at once": needs.all_updates,
        "equal weights": needs.equal_weights,
        f"at least {needs.min_examples} examples a round": needs.min_examples > 1,
    }
    for what, wanted in not_yet.items():
        if wanted:
            raise UsageError(
                f"the strategy {named.name} needs {what}, which this version does not offer; "
                "choose another with --strategy"
            )
    try:
        Plan(extra=needs.extra)
    except ValidationError:
        raise UsageError(
            f"the strategy {named.name} has needs.extra {needs.extra!r:.80}; a mapping of names to "
            'shapes, such as {"steps": ()}, or "model" is expected'
        ) from None
    closes = rules.on_deadline == "close"
    fewest = min(rules.least, rules.min_updates) if closes else rules.least
    if needs.min_updates > fewest:
        options = "--min-updates and --min-workers" if closes else "--min-workers"
        raise UsageError(
            f"the strategy {named.name} needs {needs.min_updates} updates a round, and a round may "
            f"close with {fewest}; give {options} of {needs.min_updates} or more"
        )


def check_same(named: NamedStrategy, saved: Saved, folder: Path) -> None:
    """Check that a run goes on with the strategy that it was made with.

    Raises:
        UsageError: where this is another one.
    """
    if saved.committed and saved.strategy != named.name:
        raise UsageError(
            f"the run in {folder} was made with the strategy {saved.strategy} up to round "
            f"{saved.committed}, and this command names {named.name}; give --strategy "
            f"{saved.strategy} to go on with it, or --fresh to begin a new run"
        )


def as_named(given: str | Strategy[Any]) -> NamedStrategy:
    """Return a strategy that is given by its name, see ``load_strategy``, or as an object.

    Raises:
        UsageError: where it is none.
        TaskError: where its own code fails while it is loaded.
    """
    if isinstance(given, str):
        return load_strategy(given)
    if given is FEDAVG.strategy:
        return FEDAVG
    name = type(given).__name__
    return NamedStrategy(name, _checked(name, given))
