"""The rules of a commit, one by one: what waits for it, and what happens during it."""

from __future__ import annotations

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine.state import Handle, Phase, Quorum, Rules
from tests.unit import test_rounds
from tests.unit.test_rounds import (
    Run,
    asked,
    event_names,
    late_event,
    late_verdict,
    only,
    opened,
    update,
)


def committing(*workers: str, **rules: object) -> Run:
    """Return a run whose round 1 is being committed, with the updates of these workers."""
    run = opened(*(workers or "ab"), rules=Rules(rounds=9, **rules))
    for name in workers or "ab":
        run.update(name)
    assert (run.state.phase, run.state.round) == (Phase.COMMITTING, 1)
    return run


def test_a_commit_names_the_workers_asked_before_the_cohort_was_redrawn():
    rules = Rules(rounds=1, min_workers=4, fraction=0.5, deadline_s=10, patience=1000)
    run = opened(*"abcd", rules=rules)
    first = set(run.state.asked)
    run.tick(10)
    second = set(run.state.asked)
    assert first != second
    effects = [effect for name in sorted(second) for effect in run.update(name)]
    assert only(effects, fx.Commit) == [fx.Commit(1, tuple(sorted(first | second)))]


def test_nothing_is_sent_or_acknowledged_before_the_average_is_on_disk():
    run = committing("a", "b")
    assert event_names(run.seen("c")) == ["joined"]
    assert not asked(run.seen("c"))
    assert run.tick(1) == []
    effects = run.committed("a", "b")
    assert only(effects, fx.Ack) == [fx.Ack(Handle(1, 1)), fx.Ack(Handle(1, 2))]
    assert asked(effects) == ["a", "b", "c"]
    assert run.state.base == "b1"
    assert event_names(effects) == ["committed", "opened"]


def test_the_run_ends_only_after_the_last_commit():
    run = opened("a", "b", rules=Rules(rounds=1))
    run.update("a")
    run.update("b")
    assert run.tick(1) == []
    assert run.state.phase is Phase.COMMITTING
    assert only(run.committed("a", "b"), fx.SendEvaluate)


def test_an_update_of_a_round_being_committed_is_held_until_it_is_on_disk():
    run = opened(*"abc", rules=Rules(rounds=9, min_workers=3, quorum=Quorum(number=2)))
    run.update("a")
    run.update("b")
    assert run.arrived("c") == []
    late = run.last_handle
    effects = run.committed("a", "b")
    assert fx.Ack(late) in effects
    assert only(effects, run_events.Late) == [late_event("c")]
    assert only(effects, fx.Judge) == [late_verdict(late, "c")]


def test_a_redelivery_during_the_commit_is_held_too():
    run = committing("a", "b")
    run.disconnect()
    run.connect()
    effects, again = run.arrived("a"), run.last_handle
    assert effects == [fx.Forget(again)]
    assert fx.Ack(again) in run.committed("a", "b")
    assert event_names(run.arrived("a", round=1, base="b0")) == ["duplicate"]


def test_an_update_from_other_weights_is_rejected():
    run = opened("a", "b")
    effects = run.arrived("a", base="elsewhere")
    reason = "the update was trained from the weights elsewhere; round 1 began with b0"
    judged = fx.Judge(update(run.last_handle, "a", base="elsewhere"), "rejected", reason, "round")
    assert effects == [fx.Reject(run.last_handle, reason, "round"), judged]
    assert not run.state.received
    assert only(run.update("a"), fx.Fold)


def test_a_verdict_tells_the_worker_to_train_a_rejected_update_again():
    run = opened("a", "b")
    run.arrived("a")
    assert only(run.fold_failed("a"), fx.Judge) == [
        fx.Judge(update(run.last_handle, "a"), "rejected", "it has a NaN", "not_finite")
    ]
    run.arrived("b")
    assert not only(run.fold_failed("b", again=True), fx.Judge)  # it is only asked for again


def test_an_evaluation_of_other_weights_is_ignored():
    run = committing("a", "b")
    run.committed("a", "b")
    run.evaluation("a", 1, base="elsewhere")
    assert not run.state.evaluations
    run.evaluation("a", 1)
    assert run.state.evaluations.keys() == {"a"}


def test_a_worker_at_work_on_lost_weights_is_sent_the_work():
    run = opened("a", "b")
    at_that = {"state": "training", "run": test_rounds.RUN, "round": 1}
    assert not asked(run.seen("c", **at_that, base="b0"))
    assert asked(run.seen("d", **at_that, base="elsewhere")) == ["d"]


def test_without_a_link_the_next_round_waits_for_one():
    run = committing("a", "b")
    run.disconnect()
    assert event_names(run.committed("a", "b")) == ["committed"]
    assert asked(run.connect()) == ["a", "b"]


def test_a_redelivery_of_earlier_rounds_is_a_duplicate():
    run = committing("a", "b")
    run.committed("a", "b")
    for name in "ab":
        run.update(name)
    run.committed("a", "b")
    assert event_names(run.arrived("a", round=1, base="b0")) == ["duplicate"]
    assert event_names(run.arrived("a", round=2, base="b1")) == ["duplicate"]


def test_no_round_opens_after_a_commit_that_is_enough():
    run = committing("a", "b")
    effects = run.committed("a", "b", enough="the loss is low")
    assert not only(effects, fx.SendFit)
    assert only(effects, fx.SendEvaluate) == [fx.SendEvaluate(("a", "b"))]
    run.evaluation("a", 1)
    effects = run.evaluation("b", 1)
    assert only(effects, fx.End) == [fx.End("finished", "the loss is low", ("a", "b"))]
