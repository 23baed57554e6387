"""The rules of rounds that open while earlier ones are still being written, one by one."""

from __future__ import annotations

from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine.state import Handle, Phase, Quorum, Rules
from tests.unit import test_rounds
from tests.unit.test_rounds import Run, asked, came_late, only, opened, tells


def ahead(rounds: int = 9, **rules: object) -> Run:
    """Return a run whose round 2 is open while round 1 is being written; a and b took part."""
    run = opened("a", "b", rules=Rules(rounds=rounds, **rules))
    run.update("a")
    run.update("b")
    run.averaged("a", "b")
    assert (run.state.phase, run.state.round) == (Phase.OPEN, 2)
    return run


def test_the_next_round_opens_when_the_average_is_known():
    run = opened("a", "b", rules=Rules(rounds=2))
    run.update("a")
    run.update("b")
    effects = run.averaged("a", "b")
    assert only(effects, fx.SendFit) == [fx.SendFit(("a", "b"), evaluate=True)]
    assert run.state.base == "b1"
    assert not only(effects, fx.Ack)


def test_what_was_averaged_is_acknowledged_when_it_is_on_disk():
    run = ahead()
    assert only(run.committed("a", "b"), fx.Ack) == [
        fx.Ack(Handle(1, 1)),
        fx.Ack(Handle(1, 2)),
    ]


def test_a_round_is_told_of_after_the_commit_of_the_one_before():
    run = ahead()
    assert tells(run.update("a")) == []
    effects = run.committed("a", "b")
    assert tells(effects) == ["committed", "opened", "counted"]
    assert [tell.fields["round"] for tell in only(effects, fx.Tell)] == [1, 2, 2]
    assert tells(run.update("b")) == ["counted"]


def test_two_rounds_may_be_unwritten_and_the_third_waits():
    run = ahead()
    run.update("a")
    assert only(run.update("b"), fx.Commit) == [fx.Commit(2)]
    run.averaged("a", "b")
    for name in "ab":
        assert not only(run.update(name), fx.Commit)
    assert (run.state.phase, run.state.round) == (Phase.OPEN, 3)
    assert only(run.committed("a", "b"), fx.Commit) == [fx.Commit(3)]
    assert run.state.committed == 1


def test_the_end_waits_for_the_disk():
    run = opened("a", "b", rules=Rules(rounds=1))
    run.update("a")
    run.update("b")
    assert run.averaged("a", "b") == []
    assert run.state.phase is Phase.COMMITTING
    assert only(run.committed("a", "b"), fx.SendEvaluate)


def test_what_comes_of_a_round_that_is_being_written_is_held_until_it_is_on_disk():
    rules = Rules(rounds=9, min_workers=3, quorum=Quorum(number=2))
    run = opened(*"abc", rules=rules)
    run.update("a")
    run.update("b")
    run.averaged("a", "b")
    assert run.arrived("c", round=1, base="b0") == []
    late = run.last_handle
    assert run.arrived("a", round=1, base="b0") == []
    copy = run.last_handle
    effects = run.committed("a", "b")
    assert {fx.Ack(late), fx.Ack(copy)} <= {*only(effects, fx.Ack)}
    assert [tell for tell in only(effects, fx.Tell) if tell.what == "late"] == [came_late("c")]


def test_a_redelivery_while_the_round_is_being_written_is_held_too():
    run = ahead()
    run.disconnect()
    run.connect()
    run.arrived("a", round=1, base="b0")
    again = run.last_handle
    assert fx.Ack(again) in run.committed("a", "b")
    assert tells(run.arrived("a", round=1, base="b0")) == ["duplicate"]


def test_what_was_trained_from_other_weights_is_refused():
    run = opened("a", "b")
    effects = run.arrived("a", base="elsewhere")
    told = "it was trained from the weights elsewhere, round 1 began with b0"
    assert effects == [fx.Reject(run.last_handle, told, "round")]
    assert not run.state.received
    assert only(run.update("a"), fx.Fold)


def test_an_evaluation_of_other_weights_is_passed_over():
    run = ahead()
    run.evaluation("a", 1, base="elsewhere")
    assert not run.state.evaluations
    run.evaluation("a", 1)
    assert run.state.evaluations.keys() == {"a"}


def test_a_worker_at_work_on_weights_that_were_taken_back_is_sent_the_work():
    run = opened("a", "b")
    at_that = {"state": "training", "run": test_rounds.RUN, "round": 1}
    assert not asked(run.seen("c", **at_that, base="b0"))
    assert asked(run.seen("d", **at_that, base="elsewhere")) == ["d"]


def test_no_deadline_ends_a_round_before_the_one_before_is_on_disk():
    run = ahead(deadline_s=30, on_deadline="stop", patience=1000)
    assert run.tick(31) == []
    run.committed("a", "b")
    assert run.tick(29) == []
    assert only(run.tick(2), fx.End)


def test_nor_does_everybodys_failure():
    run = ahead()
    run.failed("a", 2)
    assert not only(run.failed("b", 2), fx.End)
    assert only(run.committed("a", "b"), fx.End)


def test_the_grace_passes_meanwhile():
    run = ahead(quorum=Quorum(number=1), grace_s=5, patience=1000)
    run.update("a")
    assert test_rounds.rounds.wakeup(run.state) == run.now + 5
    assert only(run.tick(5), fx.Commit) == [fx.Commit(2)]


def test_without_a_link_the_next_round_opens_when_there_is_one():
    run = opened("a", "b", rules=Rules(rounds=2))
    run.update("a")
    run.update("b")
    run.disconnect()
    assert run.averaged("a", "b") == []
    run.committed("a", "b")
    assert asked(run.connect()) == ["a", "b"]


def test_what_comes_again_of_two_rounds_that_were_committed_without_a_link_is_a_duplicate():
    run = ahead()
    for name in "ab":
        run.update(name)
    run.averaged("a", "b")
    run.disconnect()
    run.committed("a", "b")
    run.committed("a", "b")
    run.connect()
    assert tells(run.arrived("a", round=1, base="b0")) == ["duplicate"]
    assert tells(run.arrived("a", round=2, base="b1")) == ["duplicate"]
