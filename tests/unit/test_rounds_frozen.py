"""The rules about frozen tensors, one by one: who is sent them, when, and who is refused."""

from __future__ import annotations

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine.state import Rules
from tests.unit.test_rounds import RUN, Run, event_names, only, opened, pass_time

DIGEST, OTHER = "d" * 64, "e" * 64
TAKES = {"features": ("frozen",)}
HOLDS = {**TAKES, "frozen": (OTHER, DIGEST)}


def open_run(**rules: object) -> Run:
    """Return a run whose model has frozen tensors, which a holds and b lacks."""
    run = Run(Rules(rounds=9, min_workers=2, **rules), frozen=DIGEST)
    run.connect()
    run.seen("a", hello=True, **HOLDS)
    run.seen("b", hello=True, **TAKES, frozen=(OTHER,))
    return run


def sent(effects: fx.Effects) -> dict[str, bool]:
    """Return who was sent work, and whether the frozen tensors went with it."""
    work = only(effects, fx.SendFit) + only(effects, fx.SendEvaluate)
    return {name: effect.frozen for effect in work for name in effect.workers}


def next_round(run: Run) -> fx.Effects:
    for name in "ab":
        run.update(name)
    return run.committed("a", "b")


def test_they_go_with_the_work_of_who_lacks_them():
    run = open_run()
    assert sent(run.log) == {"a": False, "b": True}
    told = run_events.FrozenSent(workers=("b",), digest=DIGEST)
    assert only(run.log, run_events.RunEvent)[-2:][0] == told


def test_they_are_not_sent_with_the_next_work_although_nothing_was_heard_of_them():
    run = open_run()
    run.now += 1
    assert sent(next_round(run)) == {"a": False, "b": False}


def test_they_are_not_sent_again_while_their_parts_arrive():
    run, step = open_run(), 0
    for _ in range(10):
        run.now += 20
        step += 1
        told = {"state": "receiving", "run": RUN, "round": 1, "step": step, "steps": 99}
        run.seen("a", **HOLDS)
        run.seen("b", **TAKES, **told)
    assert sent(next_round(run)) == {"a": False, "b": False}


def test_they_are_sent_again_if_nothing_of_them_comes_for_long():
    run = open_run()
    run.now += 59
    run.seen("a", **HOLDS)
    assert sent(run.seen("b", **TAKES)) == {"b": False}  # the work alone
    run.now += 30
    run.seen("a", **HOLDS)
    assert sent(run.seen("b", **TAKES)) == {"b": True}


def test_whoever_passes_work_over_for_want_of_them_does_not_put_them_off():
    run = open_run()
    for _ in range(4):
        run.now += 14
        run.seen("a", **HOLDS)
        run.seen("b", **TAKES, state="receiving", run=RUN, round=run.state.round)
        next_round(run)
    told = {"state": "receiving", "run": RUN, "round": run.state.round}
    run.seen("b", **TAKES, **told)
    run.now += 15
    run.seen("a", **HOLDS)
    assert sent(run.seen("b", **TAKES, **told)) == {"b": True}


def test_they_are_sent_again_after_a_hello_and_after_our_own_outage():
    run = open_run()
    told = {"state": "receiving", "run": RUN, "round": 1}
    assert sent(run.seen("b", hello=True, **TAKES, **told)) == {"b": True}
    run.disconnect()
    run.connect()
    run.seen("a", **HOLDS)
    assert sent(run.seen("b", **TAKES, **told)) == {"b": True}


def test_a_worker_that_holds_them_is_not_sent_them_after_any_outage():
    run = open_run()
    run.disconnect()
    run.connect()
    assert sent(run.seen("b", hello=True, **HOLDS)) == {"b": False}


def test_whoever_joins_late_or_begins_again_is_sent_them():
    run = open_run()
    assert sent(run.seen("c", hello=True, **TAKES)) == {"c": True}
    assert sent(run.seen("c", hello=True, session="c-2", **TAKES)) == {"c": True}
    assert sent(run.seen("c", hello=True, session="c-3", **HOLDS)) == {"c": False}


def test_a_worker_that_was_stopped_finds_them_in_its_inbox():
    run = open_run()
    run.tick(11)  # b is gone, and a too
    assert not run.state.workers
    run.now += 3600
    assert sent(run.seen("b", **TAKES)) == {"b": False}
    run.now += 59
    assert sent(run.seen("b", **TAKES)) == {"b": False}
    run.now += 30
    assert sent(run.seen("b", **TAKES)) == {"b": True}


def test_they_go_with_an_evaluation_too():
    run = Run(Rules(rounds=1, min_workers=1), committed=1, evaluated=False, frozen=DIGEST)
    run.connect()
    run.seen("a", hello=True, **TAKES)
    run.tick(10)
    assert sent(run.log) == {"a": True}


def test_without_frozen_tensors_nobody_is_sent_any():
    run = opened("a", "b")
    assert sent(run.log) == {"a": False, "b": False}
    assert "frozen_sent" not in event_names(run.log)


def test_whoever_takes_none_is_refused_at_its_hello():
    run = open_run()
    effects = run.seen("c", hello=True)
    (refused,) = only(effects, fx.Refuse)
    assert (refused.worker, refused.code) == ("c", "frozen")
    assert "c does not accept frozen tensors" in refused.reason
    assert "c" not in run.state.workers


def test_whoever_takes_none_is_refused_once_it_is_known_that_there_are_some():
    run = Run(Rules(rounds=1, min_workers=2), has_weights=False)
    run.connect()
    run.seen("a", hello=True, **TAKES, frozen=(DIGEST,))
    run.seen("b", hello=True)
    effects = run.on(ev.WeightsReady(run.now, "b0", DIGEST))
    assert [one.worker for one in only(effects, fx.Refuse)] == ["b"]
    assert not sent(effects)
    assert sent(run.seen("c", hello=True, **TAKES)) == {"a": False, "c": True}


def test_where_each_keeps_its_own_a_difference_is_told_once():
    run = Run(Rules(rounds=1, min_workers=2))
    run.connect()
    run.seen("a", hello=True, frozen=(DIGEST,))
    run.seen("b", hello=True)
    run.seen("c", hello=True, frozen=(OTHER,))
    run.seen("c", frozen=(OTHER,))
    run.seen("d", hello=True, frozen=(DIGEST,))
    differs = only(run.log, run_events.FrozenDiffers)
    assert differs == [
        run_events.FrozenDiffers(worker="c", other="a"),
        run_events.FrozenDiffers(worker="d", other="c"),
    ]


def test_those_whose_tasks_share_them_may_begin_with_different_ones():
    run = Run(Rules(rounds=1, min_workers=2))
    run.connect()
    run.seen("a", hello=True, **TAKES, frozen=(DIGEST,))
    run.seen("b", hello=True, **TAKES, frozen=(OTHER,))
    assert "frozen_differs" not in event_names(run.log)


def test_a_round_in_which_nobody_moves_ends_in_spite_of_them():
    run = open_run(deadline_s=100, max_reopenings=1)
    for _ in range(300):
        pass_time(run, 2)
        run.seen("a", **HOLDS)
        run.seen("b", **TAKES, state="receiving", run=RUN, round=1)
    assert run.state.outcome == "stopped"
