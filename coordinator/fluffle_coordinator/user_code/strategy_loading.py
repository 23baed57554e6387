"""Loads a strategy, by its name or from a user's file, and fits the run's rules to its needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fluffle_common.arguments import nearest
from fluffle_common.cli.loading import Place, load_installed
from fluffle_common.errors import UsageError
from fluffle_common.installed import installed
from fluffle_common.protocol.messages import Plan
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.selection import POISSON, UNIFORM
from fluffle_coordinator.machine.state import Quorum, Rules, State
from fluffle_coordinator.storage.run_store import Saved
from fluffle_coordinator.strategy.base import NamedStrategy, Needs, Strategy
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.strategy.names import PARTS, is_name, named_strategy
from fluffle_coordinator.user_code.calls import check_object
from fluffle_coordinator.user_code.guarded_strategy import GuardedStrategy

_GROUP = "fluffle.strategies"
_METHODS = ("init", "broadcast", "fold", "finish", "dump", "load")


def load_strategy(given: str | Strategy[Any]) -> NamedStrategy:
    """Return the strategy of ``--strategy``, or of an object.

    The option has the names of parts, an installed strategy's name, ``path.py:name`` or
    ``module:name``.

    Raises:
        UsageError: if there is no such object, or it is not a strategy.
        TaskError: if its code fails to load.
    """
    if isinstance(given, str):
        return _by_name(given)
    if given is FEDAVG.strategy:
        return FEDAVG
    name = given.__name__ if isinstance(given, type) else type(given).__name__
    return NamedStrategy(name, _checked(name, given))


def is_installed(name: str) -> bool:
    """Whether a name stands for a built-in or installed strategy, not for a file or a module."""
    return is_name(name) or name in installed(_GROUP)


def _by_name(name: str) -> NamedStrategy:
    if is_name(name):
        try:
            return named_strategy(name)
        except ValueError as wrong:
            raise UsageError(f"--strategy {name}: {wrong}") from None
    where, colon, attribute = name.rpartition(":")
    if not colon or not (where.endswith(".py") or attribute.isidentifier() or not attribute):
        return NamedStrategy(name, _checked(name, _installed(name)))
    place = Place.parse("strategy", name)
    strategy = _checked(name, place.load())
    if not place.is_file:
        return NamedStrategy(name, strategy)
    return NamedStrategy(place.called, strategy, str(Path(place.where).resolve()))


def _installed(name: str) -> Any:
    entry_points = installed(_GROUP)
    if name in entry_points:
        return load_installed("strategy", entry_points[name])
    known = {*PARTS, *entry_points}
    raise UsageError(
        f"unknown strategy '{name}' (--strategy); {nearest(name.partition(':')[0], known)} "
        "('fluffle strategies' explains every strategy; path.py:name loads your own strategy)"
    )


def _checked(name: str, value: Any) -> Any:
    check_object(Strategy, name, value, _METHODS, needs=Needs)
    return value


def rules_for(named: NamedStrategy, rules: Rules, schedule: Schedule[State] = QUORUM) -> Rules:
    """Return the rules of a run, changed so that its strategy gets what it needs.

    The minimum numbers of workers and updates are raised to the strategy's, and the number of
    rounds is limited to the strategy's. A strategy with a sampling rate decides who is asked. An
    explicit ``--quorum`` or ``--buffer`` below the strategy's minimum is an error.

    Raises:
        UsageError: if the strategy cannot get what it needs.
    """
    needs: Needs = named.strategy.needs
    try:
        Plan(extra=needs.extra)
    except ValidationError:
        raise UsageError(
            f"'needs.extra' of the strategy {named.name} is {needs.extra!r:.80}; expected "
            '"model", or a mapping of names to shapes such as {"steps": ()}'
        ) from None
    if isinstance(needs.metrics, str):
        raise UsageError(
            f"'needs.metrics' of the strategy {named.name} is {needs.metrics!r:.80}; expected a "
            f"tuple of names such as ({needs.metrics!r:.80},)"
        )
    fewest = needs.min_updates
    buffer = getattr(schedule, "buffer", None)  # only Buffered has one
    for option, given, per, effect in (
        ("--quorum", rules.quorum.number, "round", "closes a round with fewer"),
        ("--sample", rules.sample, "round", "asks for fewer"),
        ("--buffer", buffer, "version", "makes a version from fewer"),
    ):
        if given is not None and given < fewest:
            raise UsageError(
                f"the strategy {named.name} needs at least {fewest} updates per {per}, but "
                f"{option} {given} {effect}; give {option} {fewest} or more"
            )
    if needs.once:
        _check_once(named, rules, schedule)
    if needs.rate is not None:
        rules = _sampled(named, rules, needs.rate)
    if needs.max_rounds is not None and needs.max_rounds < rules.rounds:
        limit = f"the strategy {named.name} allows no more rounds"
        rules = replace(rules, rounds=needs.max_rounds, rounds_limit=limit)
    return replace(
        rules,
        min_workers=max(rules.min_workers, fewest),
        least=max(rules.least, fewest),
        min_updates=max(rules.min_updates, fewest),
    )


def _check_once(named: NamedStrategy, rules: Rules, schedule: Schedule[State]) -> None:
    if str(schedule) != "quorum":
        raise UsageError(
            f"the strategy {named.name} needs synchronous rounds that discard late updates, but "
            f"the schedule is {schedule}; remove --schedule and --late"
        )
    if rules.max_norm_ratio is not None:
        raise UsageError(
            f"--max-norm-ratio conflicts with the strategy {named.name}, because with both, one "
            "worker's update could cause another worker's update to be rejected; remove "
            "--max-norm-ratio (the strategy clips updates already)"
        )


def _sampled(named: NamedStrategy, rules: Rules, rate: float) -> Rules:
    """Return the rules of a run that samples each worker independently (Poisson sampling)."""
    conflicts = {
        f"--select {rules.selection.name}": rules.selection not in (UNIFORM, POISSON),
        f"--fraction {rules.fraction:g}": rules.fraction not in (1.0, rate),
        f"--sample {rules.sample}": rules.sample is not None,
        f"--over-provision {rules.over_provision:g}": rules.over_provision > 1,
        f"--quorum {rules.quorum.number or rules.quorum.fraction:g}": rules.quorum != Quorum(),
    }
    for option, conflicting in conflicts.items():
        if conflicting:
            raise UsageError(
                f"{option} conflicts with the strategy {named.name}, which selects each worker "
                f"with probability {rate:g} and waits for all selected workers; remove {option}, "
                "or rate= in the strategy"
            )
    return replace(rules, selection=POISSON, fraction=rate, least=1)


def uncounted_sampling(named: NamedStrategy, rules: Rules) -> str:
    """Return a note if a private run samples workers without counting that in its epsilon."""
    if not rules.samples or named.strategy.needs.rate is not None:
        return ""
    if not GuardedStrategy(named, 1).spent(1):
        return ""
    return (
        "epsilon is computed as if every worker took part in every round; give rate=… to the "
        f"strategy {named.name} to account for the sampling"
    )


def check_same(named: NamedStrategy, saved: Saved, folder: Path) -> None:
    """Check that a run continues with its own strategy.

    Raises:
        UsageError: if the strategy is another one.
    """
    if saved.committed and saved.strategy != named.name:
        raise UsageError(
            f"the run in {folder} used the strategy {saved.strategy} up to round "
            f"{saved.committed}, but this command names {named.name}; give --strategy "
            f"{saved.strategy} to continue the run, or --fresh to start a new run"
        )
