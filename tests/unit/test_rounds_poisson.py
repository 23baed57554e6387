"""The rules of rounds with a secret Poisson sample, which privacy accounting needs."""

from __future__ import annotations

from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine.selection import Draw
from fluffle_coordinator.machine.state import Phase, Quorum, Rules
from tests.unit.test_rounds import Run, asked, only, opened

NAMES = "abcdefgh"


def poisson(**rules: object) -> Rules:
    given = {"rounds": 9, "min_workers": len(NAMES), "fraction": 0.5, "secret": 3, "patience": 1000}
    return Rules(**{**given, **rules})


def drawn(number: int = 1, secret: int = 3, rate: float = 0.5) -> list[str]:
    return [name for name in NAMES if Draw(secret, number).chance(name) <= rate]


def test_the_secret_decides_who_is_asked_and_the_seed_does_not():
    assert 0 < len(drawn()) < len(NAMES)
    for seed in range(3):
        assert asked(opened(*NAMES, rules=poisson(seed=seed)).log) == drawn()
    assert asked(opened(*NAMES, rules=poisson(secret=4)).log) == drawn(secret=4) != drawn()


def test_the_number_of_workers_changes_nobodys_chance():
    present = [name for name in NAMES if name not in drawn()[:1]]
    run = opened(*present, rules=poisson(min_workers=len(present)))
    assert asked(run.log) == drawn()[1:]


def test_a_round_that_asks_nobody_is_committed_at_once():
    run = Run(poisson(fraction=1e-9))
    run.connect()
    effects = [effect for name in NAMES for effect in run.seen(name, hello=True)]
    assert only(effects, fx.Commit) == [fx.Commit(1, ())]
    assert not asked(effects)
    effects = run.committed()
    assert only(effects, fx.Commit) == [fx.Commit(2, ())]


def test_a_reopened_round_asks_the_same_sample():
    run = opened(*NAMES, rules=poisson(deadline_s=10))
    for _ in range(3):
        run.log.clear()
        run.tick(10)
        assert asked(run.log) == drawn()
    assert only([e for name in drawn() for e in run.update(name)], fx.Commit)


def test_a_sample_whose_workers_all_fail_stops_the_run_because_nobody_else_may_be_asked():
    run = opened(*NAMES, rules=poisson())
    for name in drawn():
        assert run.state.outcome is None
        assert not asked(run.failed(name, 1))
    assert run.state.outcome == "stopped"
    assert run.state.reason.startswith("every worker failed in round 1; ")


def test_a_late_joiner_is_asked_if_its_lot_is_drawn():
    first, *others = drawn()
    away = {first, next(name for name in NAMES if name not in drawn())}
    present = [name for name in NAMES if name not in away]
    run = opened(*present, rules=poisson(min_workers=len(present)))
    assert asked(run.log) == others
    late = {name: asked(run.seen(name, hello=True)) for name in sorted(away)}
    assert late == {name: [name] if name == first else [] for name in away}


def test_a_sample_that_is_gone_is_waited_for_until_the_deadline():
    run = opened(*NAMES, rules=poisson(deadline_s=10, quorum=Quorum()))
    for name in drawn():
        run.left(name)
    assert run.state.phase is Phase.OPEN
    run.tick(10)
    assert only(run.tick(1), fx.Commit)
