"""The rules of asynchronous rounds and of discounted late updates, one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QuorumRounds
from fluffle_coordinator.machine.staleness import Discount
from fluffle_coordinator.machine.state import Phase, Ticket
from fluffle_coordinator.user_code.guarded_schedule import GuardedSchedule
from tests.unit.test_rounds import RUN, Run, asked, event_names, only, opened, update


class Asynchronous(Run):
    """A run whose workers send their tickets back."""

    def __init__(self, schedule: Buffered, rounds: int = 9, **start) -> None:
        super().__init__(Rules(rounds=rounds, min_workers=1), schedule=schedule, **start)
        self.tickets: dict[str, tuple[int, int, str]] = {}  # sequence, round and base of each

    def on(self, event: ev.Event) -> fx.Effects:
        effects = super().on(event)
        for sent in only(effects, fx.SendFit):
            work = sent.sequence, self.state.round, self.state.base
            self.tickets |= dict.fromkeys(sent.workers, work)
        return effects

    def arrives(self, name: str, work: tuple[int, int, str] | None = None) -> fx.Effects:
        """Let an update arrive, for a worker's latest work or for other work."""
        sequence, number, base = work or self.tickets[name]
        self.deliveries += 1
        sent = update(self.last_handle, name, number, base)
        return self.on(replace(sent, now=self.now, ticket=Ticket(name, sequence)))

    def counts(self, name: str, work: tuple[int, int, str] | None = None) -> fx.Effects:
        """Let an update arrive and be folded."""
        sequence, *_ = work or self.tickets[name]
        effects = self.arrives(name, work)
        return [*effects, *self.on(ev.Folded(self.now, Ticket(name, sequence)))]

    def on_disk(self, enough: str = "") -> fx.Effects:
        number = self.state.round
        return self.on(ev.Committed(self.now, number, f"b{number}", enough=enough))


def running(*workers: str, schedule: Buffered | None = None, **start) -> Asynchronous:
    run = Asynchronous(schedule or Buffered(buffer=2), **start)
    run.connect()
    for name in workers:
        run.seen(name, hello=True)
    assert run.state.phase is Phase.OPEN
    return run


def test_an_idle_worker_gets_the_newest_version_at_once():
    run = running("a")
    assert asked(run.seen("b", hello=True)) == ["b"]
    assert asked(run.counts("a")) == ["a"]
    assert run.tickets["a"][1:] == (1, "b0")
    effects = run.counts("b")  # the buffer is full, so a newer version follows in a moment
    assert only(effects, fx.Commit)
    assert not asked(effects)
    assert asked(run.on_disk()) == ["b"]
    assert run.tickets["b"][1:] == (2, "b1")


def test_work_that_is_given_after_a_standstill_is_not_postponed_by_it():
    run = running("a", "b", schedule=Buffered(buffer=4), hearing=True)
    run.now += 100
    assert asked(run.counts("a")) == ["a"]  # before anyone is heard
    run.seen("b")
    assert run.state.asked["a"].at == run.now


def reopened(run: Asynchronous) -> fx.Effects:
    """Let the deadline of a run's open version pass; its workers were all heard."""
    for name in run.state.workers:
        run.seen(name, heartbeat_s=1e6)
    effects = run.tick(run.state.rules.deadline_s)
    assert "reopened" in event_names(effects)
    return effects


def test_a_reopened_version_sends_new_work_to_a_worker_that_it_has_counted_once():
    run = running("a", "b", schedule=Buffered(buffer=3))
    run.counts("a")  # and its next work is lost
    assert asked(reopened(run)) == ["a", "b"]


def test_a_reopened_version_asks_a_worker_that_failed():
    run = running("a", "b", schedule=Buffered(buffer=3))
    run.counts("b")
    run.failed("a", 1)
    assert asked(reopened(run)) == ["a", "b"]
    assert not run.state.failed


def test_a_worker_that_failed_gets_no_work_before_the_next_version():
    run = running("a", "b", "c", schedule=Buffered(buffer=2, concurrency=1))
    (first,) = run.state.asked
    (second,) = asked(run.failed(first, 1)) or asked(run.seen("b")) or asked(run.seen("c"))
    assert second != first
    assert first not in asked(run.counts(second))


def test_an_idle_worker_takes_the_place_of_the_only_one_that_was_asked_and_failed():
    run = running("a", "b", schedule=Buffered(buffer=1, concurrency=1))
    assert [*run.state.asked] == ["a"]
    run.failed("a", 1)
    assert run.state.phase is Phase.OPEN
    assert asked(run.seen("b")) == ["b"]
    run.failed("b", 1)
    assert run.state.reason == "every worker failed in round 1; b: out of memory"


def test_the_last_model_is_evaluated_by_a_worker_whose_last_training_failed():
    run = running("a", "b", schedule=Buffered(buffer=1), rounds=1)
    run.failed("a", 1)
    run.counts("b")
    run.on_disk()
    run.evaluation("b", 1)
    assert run.state.phase is Phase.EVALUATING
    (recorded,) = only(run.evaluation("a", 1), fx.RecordEvaluation)
    assert {*recorded.evaluations} == {"a", "b"}
    assert run.state.outcome == "finished"


def test_each_piece_of_work_has_a_ticket_of_its_own():
    run = running("a", schedule=Buffered(buffer=4))
    seen = {run.tickets["a"][0]}
    for _ in range(3):
        run.counts("a")
        seen.add(run.tickets["a"][0])
    assert len(seen) == 4
    assert min(seen) > run.state.rules.rounds  # these are for workers without tickets


def test_workers_continue_with_their_work_after_a_commit():
    run = running("a", "slow")
    work = run.tickets["slow"]
    for _ in range(3):
        run.counts("a")
        run.counts("a")
        run.on_disk()
    assert run.tickets["slow"] == work
    assert run.state.asked["slow"].round == 1
    effects = run.counts("slow")
    assert [effect.staleness for effect in only(effects, fx.Fold)] == [3]
    assert asked(effects) == ["slow"]


def test_a_stale_update_weighs_less():
    run = running("a", "slow")
    for _ in range(3):
        run.counts("a")
        run.counts("a")
        run.on_disk()
    folds = only(run.arrives("slow"), fx.Fold)
    assert [(one.staleness, one.discount, one.update.num_examples) for one in folds] == [
        (3, 0.5, 10)
    ]
    run.on(ev.Folded(run.now, folds[0].update.ticket))
    assert only(run.counts("a"), fx.Commit)  # it is one of the two that make a version


def test_an_update_that_is_too_old_is_late_and_its_worker_gets_new_work():
    run = running("a", "slow", schedule=Buffered(buffer=1, max_staleness=1))
    for _ in range(2):
        run.counts("a")
        run.on_disk()
    effects = run.arrives("slow")
    assert event_names(effects) == ["late"]
    assert asked(effects) == ["slow"]
    assert only(effects, fx.Ack)


def test_an_update_with_no_weight_is_late():
    schedule = Buffered(buffer=1, phi=Discount.parse("threshold:0"))
    run = running("a", "slow", schedule=schedule)
    run.counts("a")
    run.on_disk()
    assert event_names(run.arrives("slow")) == ["late"]


def test_an_update_during_the_commit_is_in_the_next_version():
    run = running("a", "b", "c")
    run.counts("a")
    run.counts("b")
    assert run.state.phase is Phase.COMMITTING
    assert not only(run.arrives("c"), fx.Fold)
    effects = run.on_disk()
    folds = only(effects, fx.Fold)
    assert [(fold.update.ticket.worker, fold.staleness) for fold in folds] == [("c", 1)]
    assert len(only(effects, fx.Ack)) == 2


@pytest.mark.parametrize("last", [{"rounds": 1}, {"enough": "accuracy reached 0.9"}])
def test_after_the_last_version_updates_are_late(last):
    run = running("a", "b", "c", rounds=last.get("rounds", 9))
    run.counts("a")
    run.counts("b")
    run.arrives("c")
    assert "late" in event_names(run.on_disk(enough=last.get("enough", "")))
    assert event_names(run.arrives("a", (run.state.sequence, 1, "b0"))) == ["late"]


def test_a_worker_whose_update_is_late_at_the_commit_gets_new_work():
    run = running("a", "b", schedule=Buffered(buffer=1, max_staleness=0))
    run.counts("a")
    run.arrives("b")
    assert asked(run.on_disk()) == ["a", "b"]


def test_a_ticket_that_an_earlier_coordinator_issued_is_not_issued_again():
    run = running("a", "b")
    _, number, base = run.tickets["a"]
    run.counts("a", (run.state.sequence + 5, number, base))
    run.counts("b")
    run.on_disk()
    assert run.tickets["b"][0] > max(ticket.sequence for ticket in run.state.counted_before[1])


def test_a_redelivery_is_recognised_by_its_ticket():
    run = running("a", "b")
    first = run.tickets["a"]
    run.counts("a")
    assert only(run.arrives("a", first), fx.Ack)  # a copy of what is in the sum
    run.counts("a")
    run.on_disk()
    assert event_names(run.arrives("a", first)) == ["duplicate"]
    assert not run.state.received


def test_an_update_from_lost_weights_is_rejected():
    run = running("a")
    sequence, number, _ = run.tickets["a"]
    (reject,) = only(run.arrives("a", (sequence, number, "elsewhere")), fx.Reject)
    assert "trained from the weights elsewhere" in reject.reason


def test_a_ticket_that_was_not_issued_is_rejected():
    run = running("a")
    (reject,) = only(run.arrives("a", (10**12, 1, "b0")), fx.Reject)
    assert "was not issued" in reject.reason


def test_after_a_restart_sent_updates_count_and_work_in_progress_is_expected():
    tickets = {3: frozenset({Ticket("a", 12_000)})}
    run = Asynchronous(
        Buffered(buffer=2, max_staleness=1), committed=3, counted=tickets, base="b3",
        earlier={2: "b1", 3: "b2", 4: "b3"},
    )  # fmt: skip
    run.connect()
    work = {"run": RUN, "round": 3, "base": "b2", "sequence": 12_007}
    assert not asked(run.seen("a", state="training", **work))
    run.seen("b", hello=True)
    assert run.state.asked["a"].sequence == 12_007
    assert run.tickets["b"][0] > 12_007
    (fold,) = only(run.arrives("a", (12_007, 3, "b2")), fx.Fold)
    assert fold.staleness == 1
    assert event_names(run.arrives("a", (12_000, 3, "b2"))) == ["duplicate"]


def test_an_old_heartbeat_does_not_revive_counted_work():
    run = running("a", "b", schedule=Buffered(buffer=2, concurrency=1))
    (busy,) = run.state.asked
    sequence, number, base = run.tickets[busy]
    run.counts(busy)
    at = {"run": RUN, "round": number, "base": base, "sequence": sequence}
    run.seen(busy, state="sending", **at)
    issued = run.state.asked.get(busy)
    assert issued is None or issued.sequence != sequence


def test_no_more_workers_train_than_the_concurrency():
    run = running("a", "b", "c", "d", schedule=Buffered(buffer=3, concurrency=2))
    for _ in range(12):
        assert run.state.tally.unfolded == 2
        run.counts(next(iter(run.state.asked)))
        if run.state.phase is Phase.COMMITTING:
            run.on_disk()
        for name in "abcd":
            run.seen(name)


def test_a_worker_without_tickets_counts_once_per_version():
    run = running("old")
    foreign = (1, 1, "b0")
    effects = run.arrives("old", foreign)
    assert not run.state.missing
    effects += run.on(ev.Folded(run.now, Ticket("old", 1)))
    assert "counted" in event_names(effects)
    assert not asked(effects)
    assert only(run.arrives("old", foreign), fx.Ack)
    run.seen("a", hello=True)
    run.counts("a")
    assert set(asked(run.on_disk())) == {"a", "old"}
    assert "counted" in event_names(run.counts("old", (2, 2, "b1")))


def test_after_a_rejection_a_worker_gets_new_work_with_the_next_version():
    run = running("bad", "a")
    run.arrives("bad")
    sequence, *_ = run.tickets["bad"]
    run.on(ev.FoldFailed(run.now, Ticket("bad", sequence), "NaN", "not_finite"))
    run.seen("bad", state="idle", run=RUN, round=1, base="b0", sequence=sequence)
    assert "bad" in run.state.failed
    run.counts("a")
    run.counts("a")
    assert "bad" in asked(run.on_disk())
    assert run.tickets["bad"][0] != sequence


def test_a_worker_that_lost_its_work_gets_the_newest_version():
    run = running("a", "b")
    old = run.tickets["b"]
    for _ in range(2):
        run.counts("a")
        run.counts("a") if run.state.phase is Phase.OPEN else None
        run.on_disk()
    assert asked(run.seen("b", hello=True, session="b-2")) == ["b"]
    assert run.tickets["b"][0] > old[0]
    assert run.tickets["b"][1] == run.state.round
    assert not asked(run.counts("b", old))  # it is at work on the newest version
    assert run.state.asked["b"].sequence == run.tickets["b"][0]


def test_an_older_version_is_evaluated_once_by_the_first_worker_that_can():
    run = running("a", "slow", "slower")
    for _ in range(2):
        run.counts("a")
        run.counts("a")
        run.on_disk()
    run.counts("a")  # it evaluates nothing
    run.counts("a")
    run.on_disk()
    evaluated = rs.Evaluated(10, 0.5, {})

    def evaluates(number: int, base: str) -> fx.Effects:
        event = ev.EvaluationArrived(run.now, RUN, number, "slow", evaluated, base)
        return only(run.on(event), fx.RecordEvaluation)

    assert not evaluates(1, "elsewhere")
    assert evaluates(1, "b1") == [fx.RecordEvaluation(1, {"slow": evaluated})]
    assert not evaluates(1, "b1")
    assert evaluates(2, "b2") == [fx.RecordEvaluation(2, {"slow": evaluated})]
    run.counts("a")
    run.evaluation("a", 3)
    assert only(run.counts("a"), fx.RecordEvaluation)
    run.on_disk()
    assert not evaluates(3, "b3")  # another one did in time


# --- late updates of synchronous rounds --------------------------------------------------------

LATE = QuorumRounds(max_staleness=1)


def test_a_late_update_counts_in_the_open_round_and_does_not_close_it():
    rules = Rules(rounds=3, min_workers=3, quorum=rs.Quorum(number=2))
    run = opened(*"abc", rules=rules, schedule=LATE)
    run.update("a")
    run.update("b")
    run.committed("a", "b")
    (fold,) = only(run.arrived("c", round=1, base="b0"), fx.Fold)
    assert (fold.update.ticket, fold.staleness) == (Ticket("c", 1), 1)
    assert fold.discount == pytest.approx(math.sqrt(0.5))
    run.on(ev.Folded(run.now, Ticket("c", 1)))
    run.update("a")
    assert run.state.phase is Phase.OPEN
    run.update("c")
    assert run.state.phase is Phase.COMMITTING
    run.committed("a", "c")
    assert run.state.counted_before[2] == {Ticket("c", 1), Ticket("a", 2), Ticket("c", 2)}


def test_a_worker_whose_late_update_counts_is_asked_in_the_next_round_too():
    rules = Rules(rounds=3, min_workers=3, quorum=rs.Quorum(number=2))
    run = opened(*"abc", rules=rules, schedule=LATE)
    run.update("a")
    run.update("b")
    run.arrived("c")
    assert asked(run.committed("a", "b")) == ["a", "b", "c"]


@pytest.mark.parametrize("schedule", [LATE, GuardedSchedule("mine.py:mine", LATE, 1, False)])
def test_a_worker_whose_late_update_counts_stays_in_a_round_that_is_reopened(schedule):
    rules = Rules(rounds=3, min_workers=3, quorum=rs.Quorum(number=2))
    run = Run(rules, schedule=schedule)
    run.connect()
    for name in "abc":
        run.seen(name, hello=True, heartbeat_s=1e6)
    run.update("a")
    run.update("b")
    run.committed("a", "b")
    run.arrived("c", round=1, base="b0")
    run.on(ev.Folded(run.now, Ticket("c", 1)))
    assert asked(run.tick(rules.deadline_s)) == ["a", "b", "c"]


def test_others_are_asked_at_once_although_a_late_update_counts():
    rules = Rules(rounds=3, min_workers=3, quorum=rs.Quorum(number=1), sample=2)
    run = opened(*"abc", rules=rules, schedule=LATE)
    first, late = run.state.asked
    run.update(first)
    run.committed(first)
    run.arrived(late, round=1, base="b0")
    run.on(ev.Folded(run.now, Ticket(late, 1)))
    one, another = run.state.asked
    run.failed(one, 2)
    assert "reopened" in event_names(run.failed(another, 2))


def test_with_late_updates_a_late_evaluation_counts_if_there_is_no_other():
    rules = Rules(rounds=4, min_workers=3, quorum=rs.Quorum(number=2))
    run = opened(*"abc", rules=rules, schedule=LATE)
    for _ in range(2):
        run.update("a")
        run.update("b")
        run.committed("a", "b")
    assert only(run.evaluation("c", 1, "b1"), fx.RecordEvaluation)
    assert not only(run.evaluation("b", 1, "b1"), fx.RecordEvaluation)


def test_a_late_update_does_not_enlarge_a_quorum_of_all():
    run = opened(*"abc", rules=Rules(rounds=3, min_workers=2), schedule=LATE)
    run.left("c")
    for name in "ab":
        run.update(name)
    run.committed("a", "b")
    run.arrived("c", round=1, base="b0")
    run.on(ev.Folded(run.now, Ticket("c", 1)))
    for name in "ab":
        run.update(name)
    assert run.state.phase is Phase.COMMITTING


# --- what a stale update weighs ----------------------------------------------------------------

discounts = st.one_of(
    st.just("constant"),
    st.builds("polynomial:{:g}".format, st.floats(0, 3)),
    st.builds("hinge:{:g},{:g}".format, st.floats(0, 20), st.floats(0, 9)),
    st.builds("threshold:{:g}".format, st.floats(0, 9)),
)


@given(discounts, st.integers(0, 1000))
def test_a_discount_begins_at_1_and_never_grows(text, staleness):
    phi = Discount.parse(text)
    assert phi(0) == 1.0
    assert 0 <= phi(staleness + 1) <= phi(staleness) <= 1.0
    assert Discount.parse(str(phi)) == phi


def test_the_discounts_of_the_papers():
    assert [Discount()(s) for s in (0, 1, 3)] == pytest.approx([1, 0.70710678, 0.5])
    assert [Discount.parse("hinge:10,4")(s) for s in (4, 5, 6)] == pytest.approx(
        [1, 1 / 11, 1 / 21]
    )
    assert [Discount.parse("threshold:2")(s) for s in (2, 3)] == [1.0, 0.0]


@pytest.mark.parametrize("text", ["", "exponential", "hinge:1", "polynomial:-1", "polynomial:x"])
def test_an_invalid_discount_is_refused(text):
    with pytest.raises(
        ValueError, match="invalid discount .* constant, polynomial:0.5, hinge:10,4, thresh"
    ):
        Discount.parse(text)
