"""The rules about norms: which updates are reported as outliers, and which are rejected."""

from __future__ import annotations

import math
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine.state import Rules, Ticket
from tests.unit.test_rounds import Run, only
from tests.unit.test_rounds_workers import arrives, heard


def folded(run: Run, name: str, norm: float) -> fx.Effects:
    effects = arrives(run, name, 10) if run.state.answer(name) is None else []
    return [*effects, *run.on(ev.Folded(run.now, Ticket(name, run.state.round), norm))]


def test_an_outlier_is_reported():
    run = heard("a", "b", "c")
    effects = [*folded(run, "a", 1.0), *folded(run, "b", 1.2), *folded(run, "c", 3e4)]
    expected = run_events.Outlier(round=1, worker="c", norm=3e4, median=1.2)
    assert only(effects, run_events.Outlier) == [expected]
    assert only(effects, fx.Commit)


def rounds_of(*norms: dict[str, float], **rules: Any) -> tuple[Run, list[list[Any]]]:
    """Commit a round with each of these norms; return the run and the outliers of each round."""
    run = heard(*norms[0], rules=Rules(rounds=len(norms) + 1, min_workers=1, **rules))
    outliers = []
    for number, by_name in enumerate(norms, start=1):
        effects = [effect for name in by_name for effect in folded(run, name, by_name[name])]
        outliers.append([(o.worker, o.median) for o in only(effects, run_events.Outlier)])
        run.on(ev.Committed(run.now, number, f"b{number}"))
    return run, outliers


def test_an_outlier_of_two_is_reported_from_the_first_round_on_and_never_becomes_usual():
    run, outliers = rounds_of(*[{"a": 1.0, "b": 40.0}] * 8)
    assert outliers == [[("b", 1.0)]] * 8
    assert run.state.median_norms == (1.0,) * 5


def test_an_outlier_alone_in_its_round_is_reported():
    _, outliers = rounds_of({"a": 1.0}, {"a": 1.1}, {"a": 40.0}, {"a": 0.9}, {"a": 40.0})
    assert outliers == [[], [], [("a", 1.1)], [], [("a", 1.1)]]


def test_norms_that_agree_with_each_other_are_no_outliers():
    usual, large = dict.fromkeys("abc", 1.0), dict.fromkeys("abc", 40.0)
    _, outliers = rounds_of(usual, usual, usual, large)
    assert outliers == [[]] * 4


def test_the_usual_norm_follows_the_rounds():
    norms = [0.8**n for n in range(21)]
    falling = [{"a": norm, "b": 1.1 * norm} for norm in norms[:-1]]
    last = {"a": 40 * norms[-1], "b": norms[-1]}
    run, outliers = rounds_of(*falling, last, max_norm_ratio=5.0)
    assert outliers == [[]] * 20 + [[("a", norms[-3])]]
    assert only(arrives(run, "a", 10), fx.Fold)[0].max_norm == 5 * norms[-3]


def test_an_outlier_is_rejected_with_the_option():
    run = heard("a", "b", "c", rules=Rules(rounds=2, max_norm_ratio=5.0))
    assert only(arrives(run, "a", 10), fx.Fold)[0].max_norm == math.inf
    folded(run, "a", 1.0)
    folded(run, "b", 3.0)
    # 5 times the lower median of 1 and 3
    assert only(arrives(run, "c", 10), fx.Fold)[0].max_norm == 5.0


def test_updates_that_change_nothing_set_no_limit_to_the_others():
    run = heard("a", "b", "c", rules=Rules(rounds=2, max_norm_ratio=5.0))
    for name in "ab":
        arrives(run, name, 10)
        folded(run, name, 0.0)
    assert only(arrives(run, "c", 10), fx.Fold)[0].max_norm == math.inf
