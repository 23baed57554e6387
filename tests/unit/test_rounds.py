"""The rules of the coordinator's machine, one by one.

``test_rounds_machine`` tests them, and the worker's, under random interleavings.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import machine as rounds
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.schedules.quorum import QuorumRounds
from fluffle_coordinator.machine.selection import parse_selection, sample_size
from fluffle_coordinator.machine.state import Handle, Phase, Quorum, Rules, Table, Ticket
from fluffle_coordinator.observe.waiting import waiting_for

_E = TypeVar("_E", bound=fx.Effect | run_events.RunEvent)
RUN = "run-a"
START = 100.0
ALL = Quorum()


def update(
    handle: Handle, worker: str, number: int = 1, base: str = "b0", num_examples: int = 10
) -> ev.Arrived:
    """Return an update of a round that arrives at the start of a ``Run``."""
    ticket = Ticket(worker, number)
    return ev.Arrived(START, RUN, handle, ticket, number, base, num_examples, 1.0, 100)


class Run:
    """A machine with a clock; each method sends it an event and returns the effects."""

    def __init__(self, rules: Rules | None = None, *, hearing: bool = False, **start: Any) -> None:
        self.now = START
        self.link = 0
        self.deliveries = 0
        self.log: fx.Effects = []
        rules = rules or Rules(rounds=2, min_workers=2)
        if not hearing:  # for most rules, all time counts
            rules = replace(rules, hearing_s=math.inf)
        if participants := start.pop("participants", ()):
            last = start["committed"]
            start["counted"] = {last: frozenset(Ticket(name, last) for name in participants)}
            announced = {**dict.fromkeys(participants, 10), **start.get("announced", {})}
            start["announced"] = rs.Table(announced)
        start = {"has_weights": True, "base": "b0", **start}
        self.state = rounds.start(rules, RUN, self.now, **start)

    def on(self, event: ev.Event) -> fx.Effects:
        self.state, effects = rounds.advance(self.state, event)
        self.log += effects
        return effects

    def connect(self) -> fx.Effects:
        self.link += 1
        return [*self.on(ev.Connected(self.now, self.link)), *self.echo()]

    def echo(self) -> fx.Effects:
        return self.on(ev.Echoed(self.now, self.link))

    def disconnect(self) -> fx.Effects:
        return self.on(ev.Disconnected(self.now))

    def seen(self, name: str, *, hello: bool = False, **fields: Any) -> fx.Effects:
        fields = {"session": f"{name}-1", "classes": (), "heartbeat_s": 2.0, **fields}
        worker = rs.Worker(name=name, num_examples=10, last_seen=self.now, **fields)
        return self.on(ev.Seen(self.now, worker, hello))

    def at_work(self, name: str, state: str = "training") -> fx.Effects:
        return self.seen(name, state=state, run=RUN, round=self.asked_round(name))

    def asked_round(self, name: str) -> int:
        issued = self.state.asked.get(name)
        return issued.round if issued else self.state.round

    def left(self, name: str, session: str | None = None) -> fx.Effects:
        return self.on(ev.Left(self.now, name, session or f"{name}-1", "it is late"))

    def arrived(
        self, name: str, *, run: str = RUN, round: int | None = None, base: str | None = None
    ) -> fx.Effects:
        self.deliveries += 1
        number = self.state.round if round is None else round
        base = self.state.base if base is None else base
        sent = update(self.last_handle, name, number, base)
        return self.on(replace(sent, now=self.now, run=run))

    @property
    def last_handle(self) -> Handle:
        return Handle(self.link, self.deliveries)

    def folded(self, name: str) -> fx.Effects:
        return self.on(ev.Folded(self.now, Ticket(name, self.state.round)))

    def fold_failed(self, name: str, *, again: bool = False) -> fx.Effects:
        ticket = Ticket(name, self.state.round)
        return self.on(ev.FoldFailed(self.now, ticket, "it has a NaN", "not_finite", again=again))

    def update(self, name: str) -> fx.Effects:
        return [*self.arrived(name), *self.folded(name)]

    def committed(self, *participants: str, enough: str = "") -> fx.Effects:
        """Commit the round; check that these are its participants."""
        number = self.state.round
        effects = self.on(ev.Committed(self.now, number, f"b{number}", enough=enough))
        assert {t.worker for t in self.state.counted_before[number]} == {*participants}
        return effects

    def evaluation(self, name: str, round: int, base: str | None = None) -> fx.Effects:
        evaluated = rs.Evaluated(10, 0.5, {})
        base = self.state.base if base is None else base
        return self.on(ev.EvaluationArrived(self.now, RUN, round, name, evaluated, base))

    def failed(self, name: str, round: int) -> fx.Effects:
        return self.on(ev.Failed(self.now, name, RUN, round, "out of memory"))

    def tick(self, seconds: float = 0.0) -> fx.Effects:
        self.now += seconds
        return self.on(ev.Tick(self.now))

    def sleep(self) -> fx.Effects:
        """Advance the clock to the machine's wakeup, and tick."""
        self.now = max(self.now, rounds.wakeup(self.state))
        return self.on(ev.Tick(self.now))


def pass_time(run: Run, seconds: float, heard: str = "") -> fx.Effects:
    """Advance the clock, while these workers and the coordinator's echo are heard."""
    effects: fx.Effects = []
    end = run.now + seconds
    while run.now < end:
        run.now = min(end, run.now + 2.0)
        effects += run.echo()
        for name in heard:
            effects += run.seen(name)
        effects += run.tick()
    return effects


def opened(*workers: str, rules: Rules | None = None, **start: Any) -> Run:
    """Return a run with these workers and an open round."""
    run = Run(rules, **start)
    run.connect()
    for name in workers:
        run.seen(name, hello=True)
    assert run.state.phase is Phase.OPEN
    return run


def committing_during_a_fold() -> Run:
    """Return a run that commits the updates of a and b while that of c is being folded."""
    run = opened(*"abc", rules=Rules(rounds=2, min_workers=3, quorum=Quorum(number=2)))
    run.arrived("c")
    run.update("a")
    run.update("b")
    assert run.state.phase is Phase.COMMITTING
    return run


def late_event(worker: str) -> run_events.Late:
    return run_events.Late(worker=worker, round=1, num_examples=10)


def late_verdict(handle: Handle, worker: str, base: str = "b0") -> fx.Judge:
    late = update(handle, worker, base=base)
    return fx.Judge(late, "late", "round 1 was committed without this update")


def only(effects: fx.Effects, kind: type[_E]) -> list[_E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def event_names(effects: fx.Effects) -> list[str]:
    return [event.name for event in only(effects, run_events.RunEvent)]


def asked(effects: fx.Effects) -> list[str]:
    sent = [e for e in effects if isinstance(e, fx.SendFit | fx.SendEvaluate)]
    return [name for effect in sent for name in effect.workers]


# --- before the first round --------------------------------------------------------------------


def test_the_first_round_waits_for_min_workers():
    run = Run(Rules(rounds=1, min_workers=3))
    run.connect()
    for name in "ab":
        assert not asked(run.seen(name, hello=True))
    assert run.state.phase is Phase.WAITING
    assert asked(run.seen("c", hello=True)) == ["a", "b", "c"]
    assert run.state.phase is Phase.OPEN


def test_nothing_is_opened_without_a_link():
    run = opened("a", "b")
    run.update("a")
    run.update("b")
    run.disconnect()
    assert not asked(run.committed("a", "b"))
    assert asked(run.connect()) == ["a", "b"]


def test_too_few_workers_stop_the_run_with_the_reason():
    run = Run(Rules(rounds=1, min_workers=3, wait_s=60))
    run.connect()
    run.seen("a", hello=True, heartbeat_s=100)
    run.sleep()
    assert (run.state.outcome, run.state.reason) == (
        "stopped",
        "1 of 3 workers joined in 60 s (--wait-workers)",
    )


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.29, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("least", [1, 2, 3, 7, 30])
def test_a_fraction_waits_for_the_fewest_workers_that_reach_the_quorum(fraction, least):
    fewest = Rules(rounds=1, fraction=fraction, least=least).fewest_present
    assert sample_size(fraction, fewest) >= least
    assert fewest == least or sample_size(fraction, fewest - 1) < least


def test_a_quorum_that_the_sample_cannot_reach_does_not_hang_the_coordinator():
    run = opened("a", "b", "c", rules=Rules(rounds=1, sample=2, quorum=Quorum(number=3)))
    assert (run.state.workers_needed, len(run.state.asked)) == (3, 2)


def test_work_is_not_sent_again_because_of_heartbeats_that_waited_during_a_standstill():
    run = opened("a", "b", rules=Rules(rounds=1, hearing_s=3.0), hearing=True)
    run.now += 100  # the coordinator was stopped; what it reads now was sent before
    assert not asked(run.seen("a"))
    sent = []
    for _ in range(int(Rules(rounds=1).resend_s)):  # from now on, time counts
        run.now += 1
        sent += asked(run.seen("a"))
    assert sent == ["a"]


def test_an_outage_does_not_count_as_waiting_for_workers():
    run = opened("a", "b", rules=Rules(rounds=2, wait_s=60))
    run.update("a")
    run.update("b")
    run.disconnect()
    run.committed("a", "b")
    run.now += 3600
    assert asked(run.connect()) == ["a", "b"]


def test_the_first_weights_are_asked_of_one_worker_at_once():
    run = Run(has_weights=False)
    run.connect()
    assert only(run.seen("b", hello=True), fx.AskInit) == [fx.AskInit("b")]
    assert not only(run.seen("a", hello=True), fx.AskInit)
    assert run.state.phase is Phase.WAITING
    assert asked(run.on(ev.WeightsReady(run.now, "b0"))) == ["a", "b"]


def test_the_first_weights_wait_for_the_vote_on_the_model():
    run = Run(has_weights=False)
    run.connect()
    assert not only(run.seen("b", hello=True, classes=("x", "y")), fx.AskInit)
    asked = only(run.seen("a", hello=True, classes=("x", "y")), fx.AskInit)
    assert asked == [fx.AskInit("a")]


@pytest.mark.parametrize(
    "event",
    [
        lambda run: run.left("b"),
        lambda run: run.failed("b", 0),
        lambda run: (run.tick(8), run.seen("a"), run.tick(2))[-1],
        lambda run: pass_time(run, 60.0, "ab"),
        lambda run: run.on(ev.InitLost(run.now, "b")),
    ],
    ids=["left", "failed", "gone", "takes too long", "parts lost"],
)
def test_the_first_weights_are_asked_of_another_worker(event):
    run = Run(Rules(rounds=2, deadline_s=60), has_weights=False)
    run.connect()
    run.seen("b", hello=True)
    run.seen("a", hello=True)
    assert only(event(run), fx.AskInit) == [fx.AskInit("a")]


def test_first_weights_that_are_lost_again_are_not_asked_for_all_the_time():
    run = Run(Rules(rounds=2, resend_s=15), has_weights=False)
    run.connect()
    run.seen("a", hello=True)
    run.seen("b", hello=True)
    assert only(run.on(ev.InitLost(run.now, "a")), fx.AskInit) == [fx.AskInit("a")]
    assert not only(run.on(ev.InitLost(run.now, "a")), fx.AskInit)
    assert rounds.wakeup(run.state) <= run.now + 15
    assert fx.AskInit("a") in pass_time(run, 15.0, "ab")


def test_first_weights_that_come_too_late_are_a_failure_of_their_worker_not_of_its_task():
    run = Run(Rules(rounds=2, deadline_s=6), has_weights=False)
    run.connect()
    run.seen("a", hello=True)
    (failure,) = only(pass_time(run, 6.0, "a"), run_events.Failure)
    assert failure.sentence() == "round 0: a failed: no first weights within 6 s (--deadline)"


def test_first_weights_lost_on_their_way_from_an_earlier_worker_are_not_asked_for_again():
    run = Run(has_weights=False)
    run.connect()
    run.seen("b", hello=True)
    run.seen("a", hello=True)
    run.left("b")
    assert not only(run.on(ev.InitLost(run.now, "b")), fx.AskInit)


def test_the_first_weights_are_asked_again_of_a_worker_that_restarted():
    run = Run(has_weights=False)
    run.connect()
    run.seen("a", hello=True)
    run.seen("b", hello=True)
    assert only(run.seen("a", session="a-2"), fx.AskInit) == [fx.AskInit("a")]


def test_no_first_weights_stop_the_run_with_the_reason():
    run = Run(has_weights=False)
    run.connect()
    for name in "ab":
        run.seen(name, hello=True)
    run.failed("a", 0)
    run.failed("b", 0)
    assert run.state.reason == "no first weights; b: out of memory"


def test_first_weights_that_never_come_stop_the_run_with_the_reason():
    run = Run(Rules(rounds=1, min_workers=1, wait_s=60), has_weights=False)
    run.connect()
    run.seen("a", hello=True, heartbeat_s=100)
    run.sleep()
    assert run.state.reason == "no first weights arrived in 60 s (--wait-workers)"


def test_a_worker_that_failed_to_make_first_weights_can_still_train():
    run = Run(Rules(rounds=1, min_workers=2), has_weights=False)
    run.connect()
    run.seen("a", hello=True)
    run.seen("b", hello=True)
    run.failed("a", 0)
    run.on(ev.WeightsReady(run.now, "b0"))
    run.left("b")
    assert run.state.phase is Phase.OPEN
    run.tick(16)
    run.seen("a")
    assert asked(run.seen("a", hello=True)) == ["a"]


# --- the quorum --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quorum", "enough"),
    [(Quorum(number=3), 3), (Quorum(fraction=0.5), 2), (Quorum(fraction=0.51), 3), (ALL, 4)],
)
def test_the_quorum_commits(quorum, enough):
    run = opened(*"abcd", rules=Rules(rounds=1, min_workers=4, quorum=quorum))
    for count, name in enumerate("abcd"[:enough], start=1):
        commits = only(run.update(name), fx.Commit)
        assert [effect.round for effect in commits] == ([1] if count == enough else [])


def test_an_update_counts_when_it_is_folded_not_when_it_arrives():
    run = opened("a", "b")
    run.update("a")
    assert only(run.arrived("b"), fx.Fold) == [fx.Fold(update(run.last_handle, "b"))]
    assert run.state.phase is Phase.OPEN
    run.folded("b")
    assert run.state.phase is Phase.COMMITTING


def test_after_the_quorum_the_others_have_a_grace():
    rules = Rules(rounds=1, min_workers=3, quorum=Quorum(number=1), grace_s=5)
    run = opened(*"abc", rules=rules)
    assert not only(run.update("a"), fx.Commit)
    assert rounds.wakeup(run.state) == run.now + 5
    run.tick(4)
    run.update("b")
    assert only(run.tick(1), fx.Commit)


def test_the_grace_ends_when_everyone_has_answered():
    run = opened("a", "b", rules=Rules(rounds=1, quorum=Quorum(number=1), grace_s=5))
    run.update("a")
    assert only(run.update("b"), fx.Commit)


def test_a_late_joiner_does_not_undo_a_quorum():
    rules = Rules(rounds=1, quorum=Quorum(fraction=0.5), grace_s=5)
    run = opened("a", "b", rules=rules)
    run.update("a")
    for name in "cd":
        run.seen(name, hello=True)
    assert run.state.needed == 2
    assert only(run.tick(5), fx.Commit)


def test_the_grace_may_last_longer_than_the_deadline():
    rules = Rules(rounds=1, quorum=Quorum(number=1), grace_s=50, deadline_s=9, patience=100)
    run = opened("a", "b", rules=rules)
    run.tick(8)
    run.update("a")
    assert not only(run.tick(10), fx.Commit)
    assert rounds.wakeup(run.state) == 158.0
    assert only(run.sleep(), fx.Commit)


def test_nothing_is_acknowledged_before_the_commit_is_on_disk():
    run = opened("a", "b")
    for name in "ab":
        run.update(name)
    assert not only(run.log, fx.Ack)
    effects = run.committed("a", "b")
    assert only(effects, fx.Ack) == [fx.Ack(Handle(1, 1)), fx.Ack(Handle(1, 2))]
    assert asked(effects) == ["a", "b"]
    assert run.state.round == 2


def test_what_was_not_folded_at_the_commit_is_late():
    run = opened(*"abc", rules=Rules(rounds=1, min_workers=3, quorum=Quorum(number=2)))
    run.arrived("c")
    run.update("a")
    run.update("b")
    effects = run.committed("a", "b")
    assert fx.Ack(Handle(1, 1)) in effects
    assert late_event("c") in effects


def test_an_update_that_was_folded_during_the_commit_counts():
    run = opened(*"abc", rules=Rules(rounds=2, min_workers=3, quorum=Quorum(number=2)))
    for name in "abc":
        run.arrived(name)
    run.folded("a")
    run.folded("b")
    assert not only(run.folded("c"), fx.Commit)
    assert "late" not in event_names(run.committed(*"abc"))


# --- the deadline ------------------------------------------------------------------------------


def deadline(on_deadline: str, **rules: Any) -> Run:
    """Return a run a second before its deadline, with one update of two."""
    given = {"rounds": 1, "deadline_s": 60, "patience": 1000, **rules}
    run = opened("a", "b", rules=Rules(on_deadline=on_deadline, **given))
    run.update("a")
    run.at_work("b")
    run.tick(59)
    assert run.state.phase is Phase.OPEN
    return run


def test_the_deadline_stops_with_the_reason():
    run = deadline("stop")
    run.tick(1)
    assert run.state.reason == "round 1 has 1 of 2 updates after 60 s, missing: b"


def test_the_deadline_closes_with_the_updates_present():
    assert only(deadline("close").tick(1), fx.Commit)


@pytest.mark.parametrize("on_deadline", ["close", "reopen", "stop"])
def test_the_deadline_waits_for_updates_that_are_being_folded(on_deadline):
    run = deadline(on_deadline)
    run.arrived("b")  # the disk is full, for example
    assert not event_names(run.tick(600))
    assert run.state.phase is Phase.OPEN
    assert rounds.wakeup(run.state) > run.now
    assert only(run.folded("b"), fx.Commit)


def test_the_deadline_decides_once_a_late_fold_has_failed():
    run = deadline("stop")
    run.arrived("b")
    run.tick(600)
    run.fold_failed("b", again=True)
    assert run.state.reason == "round 1 has 1 of 2 updates after 659 s, missing: b"


def test_no_round_waits_for_a_fold_beyond_its_maximum():
    run = deadline("stop", max_round_s=600)
    run.arrived("b")
    run.sleep()
    assert run.state.outcome == "stopped"
    assert run.state.reason.endswith("2 updates after 600 s, other updates are still being added")


class Never(QuorumRounds):
    """Rounds that their schedule never closes."""

    def closes(self, state: rs.State, now: float) -> bool:
        return False

    def wakeup(self, state: rs.State) -> float:
        return state.opened_at if state.rules.grace_s else math.inf


@pytest.mark.parametrize("grace_s", [0, 5])
def test_the_deadline_closes_a_round_that_its_schedule_does_not_close(grace_s):
    rules = Rules(rounds=1, deadline_s=60, patience=1000, grace_s=grace_s)
    run = opened("a", "b", rules=rules, schedule=Never())
    run.update("a")
    run.tick(30)
    run.update("b")
    assert not only(run.tick(59), fx.Commit)
    effects = run.tick(1)
    assert only(effects, fx.Commit)
    (closed,) = only(effects, run_events.RunEvent)
    assert closed.reason == (
        "round 1 has its quorum, but the schedule did not close the round within 60 s (--deadline)"
    )


def test_the_deadline_reopens_with_too_few_updates():
    run = deadline("close", min_updates=2)
    assert "reopened" in event_names(run.tick(1))
    assert run.state.phase is Phase.OPEN


def test_the_deadline_reopens_for_idle_workers():
    run = deadline("reopen")
    for name in "cd":
        run.seen(name, hello=True)
    run.at_work("c")
    effects = run.tick(1)
    assert asked(effects) == ["d"]  # b and c are at work
    assert set(run.state.asked) == set("abcd")
    assert rounds.wakeup(run.state) == run.now + 60
    assert not only(effects, fx.Ack)  # the update of a is held


def test_a_model_in_parts_that_does_not_advance_is_sent_again():
    run = opened("a", "b")
    for second in range(0, 14, 2):
        run.now += 2
        run.seen("a")
        step = min(second, 4)  # the sixth part never comes
        assert not asked(run.seen("b", state="receiving", run=RUN, round=1, step=step, steps=9))
    run.now += 9
    assert asked(run.seen("b", state="receiving", run=RUN, round=1, step=4, steps=9)) == ["b"]


def test_reopenings_without_a_new_update_are_bounded():
    run = deadline("reopen", max_reopenings=3)
    for _ in range(3):
        assert "reopened" in event_names(run.sleep())
    run.sleep()
    assert run.state.outcome == "stopped"
    assert run.state.reason.endswith(
        "missing: b; the round was reopened at its --deadline 3 times without progress"
    )


def test_a_round_that_stops_for_a_rejected_update_says_why():
    run = deadline("stop")
    run.arrived("b")
    run.fold_failed("b")
    run.sleep()
    assert run.state.reason.endswith("missing: b; the update of b was rejected: it has a NaN")


def test_a_round_that_stops_while_some_are_missing_says_why_one_of_them_failed():
    run = deadline("stop", quorum=Quorum(number=2))
    run.failed("b", 1)
    run.tick(1)
    assert run.state.reason.endswith("missing: b; b: out of memory")


def test_an_update_between_reopenings_resets_their_count():
    run = opened(*"abc", rules=Rules(rounds=1, min_workers=3, patience=10_000, max_reopenings=1))
    for name in "ab":
        assert "reopened" in event_names(run.sleep())
        run.update(name)
    assert "reopened" in event_names(run.sleep())
    run.sleep()
    assert run.state.outcome == "stopped"


def test_an_outage_does_not_count_for_the_deadline():
    run = deadline("stop")
    run.disconnect()
    run.now += 3600
    run.connect()
    assert run.state.phase is Phase.OPEN
    run.tick(1)
    assert run.state.outcome == "stopped"


# --- who is asked ------------------------------------------------------------------------------


def test_a_late_joiner_gets_the_open_work():
    run = opened("a", "b")
    assert asked(run.seen("c")) == ["c"]
    assert run.state.needed == 3


def test_a_worker_that_was_not_selected_is_not_asked_in_the_round():
    run = opened("a", "b", rules=Rules(rounds=1, fraction=0.5))
    assert not asked(run.seen("c", hello=True))


def test_a_selection_knows_who_was_asked_and_how_long_each_trained():
    rules = Rules(rounds=9, min_workers=4, sample=2, selection=parse_selection("round-robin"))
    run = opened("a", "b", "c", "d", rules=rules)
    first = {*run.state.asked}
    for name in first:
        run.update(name)
    run.committed(*first)
    assert {*run.state.asked} == {*"abcd"} - first
    assert run.state.train_s == Table(dict.fromkeys(first, 1.0))


def test_lost_work_is_sent_again_to_a_worker_that_stays_idle():
    run = opened("a", "b", rules=Rules(rounds=1, resend_s=15))
    run.tick(9)
    assert not asked(run.seen("a"))
    run.at_work("b")
    run.tick(6)
    assert not asked(run.at_work("b"))
    assert asked(run.seen("a")) == ["a"]


def test_a_worker_that_may_just_have_answered_gets_more_time():
    run = opened("a", "b", rules=Rules(rounds=1, resend_s=15, patience=100))
    run.tick(59)
    assert not asked(run.seen("a", run=RUN, round=1))
    run.tick(1)
    assert asked(run.seen("a", run=RUN, round=1)) == ["a"]


def test_a_hello_of_an_idle_worker_is_answered_with_the_work():
    run = opened("a", "b")
    assert asked(run.seen("a", hello=True, session="a-2")) == ["a"]


def test_a_hello_of_a_worker_at_work_is_not_answered_with_work():
    run = opened("a", "b")
    assert not asked(run.seen("a", hello=True, state="training", run=RUN, round=1))


def test_a_worker_whose_link_broke_while_receiving_is_asked_again():
    run = opened("a", "b")
    assert not asked(run.seen("a", state="receiving", run=RUN, round=1))
    assert asked(run.seen("a", hello=True, state="receiving", run=RUN, round=1)) == ["a"]


def test_after_a_lost_link_idle_workers_get_their_work_again_at_once():
    run = opened("a", "b")
    run.disconnect()
    run.connect()
    assert asked(run.seen("a")) == ["a"]
    assert not asked(run.at_work("b"))


def test_other_classes_are_refused():
    run = Run(Rules(rounds=1, min_workers=1))
    run.connect()
    run.seen("a", hello=True, classes=("cat", "dog"))
    effects = run.seen("b", hello=True, classes=("cat",))
    (refused,) = only(effects, fx.Refuse)
    assert refused.reason.startswith(
        "worker b lacks the class dog; the federation's classes come from a;"
    )
    assert "b" not in run.state.workers


# --- updates -----------------------------------------------------------------------------------


def test_a_late_update_is_acknowledged_and_reported():
    run = opened("a", "b", rules=Rules(rounds=2, quorum=Quorum(number=1)))
    run.update("a")
    run.committed("a")
    late = Handle(1, 2)
    verdict = late_verdict(late, "b", base="b1")
    assert run.arrived("b", round=1) == [fx.Ack(late), late_event("b"), verdict]
    assert not run.state.received


def test_an_update_during_the_commit_is_late_once_that_is_on_disk():
    run = opened("a", "b", rules=Rules(rounds=2, quorum=Quorum(number=1)))
    run.update("a")
    assert not run.arrived("b")  # a crash may still reopen the round
    late = [fx.Ack(Handle(1, 2)), late_event("b")]
    effects = run.committed("a")
    assert effects[1:3] == late
    assert not run.state.received


def test_a_redelivery_after_the_commit_is_a_duplicate():
    run = opened("a", "b", rules=Rules(rounds=2, quorum=Quorum(number=1)))
    run.update("a")
    run.committed("a")
    assert run.arrived("a", round=1) == [
        fx.Ack(run.last_handle),
        run_events.Duplicate(worker="a", round=1),
    ]


def test_a_redelivery_after_a_resume_is_a_duplicate():
    run = Run(committed=1, participants=["a"])
    run.connect()
    assert event_names(run.arrived("a", round=1)) == ["duplicate"]
    assert event_names(run.arrived("b", round=1)) == ["late"]


def test_a_worker_that_invents_tickets_counts_once_in_a_round():
    run = opened("a", "b")
    for number, sequence in enumerate((7, 8, 1), start=1):
        one = update(Handle(1, number), "a")
        effects = run.on(replace(one, ticket=Ticket("a", sequence)))
        assert bool(only(effects, fx.Fold)) == (number == 1)
    run.folded("a")
    assert run.state.folded == 1


def test_a_copy_of_a_held_update_is_acknowledged():
    run = opened("a", "b")
    run.update("a")
    assert run.arrived("a") == [fx.Ack(run.last_handle)]
    assert run.state.folded == 1


def test_a_redelivery_replaces_the_void_delivery():
    run = opened("a", "b")
    run.update("a")
    run.disconnect()
    run.connect()
    effects, redelivered = run.arrived("a"), run.last_handle
    assert effects == [fx.Forget(redelivered)]
    run.update("b")
    assert fx.Ack(redelivered) in run.committed("a", "b")


def test_a_redelivery_during_the_fold_is_forgotten_once_the_update_is_in_the_sum():
    run = opened("a", "b")
    run.arrived("a")
    run.disconnect()
    run.connect()
    assert not run.arrived("a")
    redelivered = run.last_handle
    assert only(run.folded("a"), fx.Forget) == [fx.Forget(redelivered)]
    run.update("b")
    assert fx.Ack(redelivered) in run.committed("a", "b")


def test_a_copy_during_the_fold_is_held_until_the_first_is_sound():
    run = opened("a", "b")
    run.arrived("a")
    assert not run.arrived("a")
    spare = run.last_handle
    assert only(run.folded("a"), fx.Ack) == [fx.Ack(spare)]


def test_the_copy_is_folded_if_the_first_is_rejected():
    run = opened("a", "b")
    run.arrived("a")
    first = run.last_handle
    run.arrived("a")
    effects = run.fold_failed("a")
    assert effects == [
        fx.Reject(first, "it has a NaN", "not_finite"),
        fx.Fold(update(run.last_handle, "a")),
    ]
    run.folded("a")
    assert run.state.folded == 1
    run.update("b")
    assert fx.Ack(run.last_handle) in run.committed("a", "b")


def test_a_copy_is_not_folded_while_the_round_is_being_committed():
    run = committing_during_a_fold()
    run.arrived("c")
    spare = run.last_handle
    effects = run.fold_failed("c")
    assert effects == [fx.Reject(Handle(1, 1), "it has a NaN", "not_finite")]
    assert fx.Ack(spare) in run.committed("a", "b")


def test_a_redelivery_during_the_fold_of_the_void_one_is_used_if_that_fails():
    run = opened("a", "b")
    run.arrived("a")
    run.disconnect()
    run.connect()
    run.arrived("a")
    effects = run.fold_failed("a", again=True)
    assert only(effects, fx.Fold) == [fx.Fold(update(run.last_handle, "a"))]
    assert not asked(effects)
    assert fx.Ack(run.last_handle) not in effects


def test_all_copies_are_held_if_the_folded_one_is_void():
    run = opened("a", "b")
    run.arrived("a")
    run.disconnect()
    run.connect()
    run.arrived("a")
    run.arrived("a")
    assert not only(run.folded("a"), fx.Ack)
    run.update("b")
    acked = only(run.committed("a", "b"), fx.Ack)
    assert {fx.Ack(Handle(2, 2)), fx.Ack(Handle(2, 3))} <= set(acked)


def test_a_void_copy_is_not_used():
    run = opened("a", "b")
    run.arrived("a")
    run.arrived("a")
    void = run.last_handle
    run.disconnect()
    assert fx.Ack(void) in run.connect()  # so that its memory is freed
    assert not only(run.fold_failed("a"), fx.Fold)


def done(run: Run, name: str) -> fx.Effects:
    return run.seen(name, run=RUN, round=run.state.round)


def test_a_worker_whose_update_was_rejected_is_not_waited_for():
    run = opened("a", "b")
    run.update("a")
    done(run, "b")
    run.arrived("b")
    effects = run.fold_failed("b")
    assert only(effects, fx.Reject) == [fx.Reject(run.last_handle, "it has a NaN", "not_finite")]
    assert only(effects, fx.Commit)


@pytest.mark.parametrize("state", ["idle", "training", "sending"])
def test_a_rejected_update_fails_its_worker_only_if_it_reports_it_as_sent(state):
    run = opened("a", "b")
    run.update("a")
    run.seen("b", state=state, run=RUN, round=1 if state != "idle" else 0)
    run.arrived("b")
    assert not only(run.fold_failed("b"), fx.Commit)
    assert not run.state.failed
    assert only(done(run, "b"), fx.Commit)


def test_a_workers_own_update_counts_after_a_forged_one_was_rejected():
    run = opened("a", "b")
    run.update("a")
    run.at_work("b")
    run.arrived("b")
    run.fold_failed("b")
    effects = run.update("b")
    assert only(effects, fx.Commit)
    assert not run.state.failed
    assert not run.state.doubted


def test_a_sound_update_clears_its_workers_failure():
    run = opened("a", "b", "c")
    done(run, "b")
    run.arrived("b")
    run.fold_failed("b")
    assert run.state.failed
    run.update("b")
    assert not run.state.failed
    assert run.state.tally.expected == 3


def test_a_run_does_not_stop_for_failures_while_an_update_is_being_folded():
    run = opened("a", "b")
    run.failed("a", 1)
    run.arrived("a")
    run.failed("b", 1)
    run.folded("a")
    assert run.state.phase is Phase.COMMITTING


def test_every_worker_that_ever_joined_is_told_of_the_end():
    run = resumed(Rules(rounds=1, min_workers=1), evaluated=True)
    run.sleep()
    assert [end.workers for end in only(run.log, fx.End)] == [("a", "b", "c")]
    run = all_rounds_done()
    run.left("b")
    assert [end.workers for end in only(run.evaluation("a", 1), fx.End)] == [("a", "b")]


def test_an_update_that_arrived_incomplete_is_requested_again():
    run = opened("a", "b")
    run.arrived("a")
    effects = run.fold_failed("a", again=True)
    assert fx.Ack(run.last_handle) in effects
    assert asked(effects) == ["a"]
    assert only(run.arrived("a"), fx.Fold)


def test_an_incomplete_update_is_not_requested_of_a_worker_that_was_not_asked():
    run = opened("a", "b", "c", rules=Rules(rounds=2, min_workers=3, sample=2))
    (other,) = {*"abc"} - {*run.state.asked}
    run.arrived(other)
    assert not asked(run.fold_failed(other, again=True))


def test_an_incomplete_update_is_not_requested_while_its_round_is_being_committed():
    run = committing_during_a_fold()
    assert not asked(run.fold_failed("c", again=True))


def test_an_update_of_a_worker_that_was_not_asked_does_not_take_the_place_of_another():
    run = opened("a", "b", rules=Rules(rounds=2, quorum=ALL))
    run.update("stranger")
    run.update("a")
    assert run.state.phase is Phase.OPEN
    run.update("b")
    assert run.state.phase is Phase.COMMITTING


@pytest.mark.parametrize(
    ("of", "reason", "cause"),
    [
        (
            {"run": "run-b"},
            "the message belongs to run run-b, but this coordinator runs run-a",
            "run",
        ),
        ({"round": 2}, "round 2 has not been opened", "round"),
    ],
)
def test_an_update_of_another_round_is_rejected_with_the_reason(of, reason, cause):
    run = opened("a", "b")
    effects = run.arrived("a", **of)
    judged = [fx.Judge(update(run.last_handle, "a", 2), "rejected", reason, cause)]
    rejected = [fx.Reject(run.last_handle, reason, cause)]
    assert effects == rejected + ([] if "run" in of else judged)


def test_updates_are_rejected_without_weights_and_after_the_last_round():
    run = Run(has_weights=False)
    run.connect()
    assert only(run.arrived("a"), fx.Reject)
    run = opened("a", "b", rules=Rules(rounds=1))
    for name in "ab":
        run.update(name)
    run.committed("a", "b")
    assert run.state.phase is Phase.EVALUATING
    assert only(run.arrived("a"), fx.Reject)


# --- workers that leave, are gone, or fail -----------------------------------------------------


@pytest.mark.parametrize("quorum", [ALL, Quorum(number=2)])
def test_a_worker_that_leaves_lowers_a_fractional_quorum_but_not_a_number(quorum):
    run = opened("a", "b", rules=Rules(rounds=1, quorum=quorum))
    run.update("a")
    commits = only(run.left("b"), fx.Commit)
    assert [effect.round for effect in commits] == ([1] if quorum.number is None else [])


def test_an_update_counts_after_its_worker_has_left():
    run = opened("a", "b")
    run.update("a")
    run.left("a")
    assert run.state.needed == 2
    assert only(run.update("b"), fx.Commit)


def test_the_bye_of_an_earlier_session_is_ignored():
    run = opened("a", "b")
    run.left("a", session="a-0")
    assert "a" in run.state.workers


def test_a_worker_without_heartbeats_is_gone():
    run = opened("a", "b", rules=Rules(rounds=1, patience=5))
    run.update("a")
    run.tick(9)
    assert not only(run.seen("a"), fx.Commit)
    assert rounds.wakeup(run.state) == run.now + 1
    effects = run.tick(1)
    assert run_events.Gone(worker="b", silent_s=10.0) in effects
    assert only(effects, fx.Commit)


def test_a_slow_worker_that_still_heartbeats_is_not_gone():
    run = opened("a", "b", rules=Rules(rounds=1, deadline_s=10_000))
    run.update("a")
    for _ in range(1000):
        run.tick(2)
        run.seen("a")
        run.at_work("b")
    assert set(run.state.workers) == {"a", "b"}
    assert run.state.phase is Phase.OPEN


def test_a_gone_worker_that_is_at_work_counts_again():
    run = opened("a", "b")
    run.tick(8)
    run.seen("a")
    run.tick(2)
    assert run.state.tally.expected == 1
    assert not asked(run.at_work("b"))
    assert run.state.tally.expected == 2


def test_an_outage_of_the_broker_makes_no_worker_gone():
    run = opened("a", "b")
    run.disconnect()
    run.tick(3600)
    run.connect()
    run.tick(9)
    assert set(run.state.workers) == {"a", "b"}


def test_a_failed_worker_is_not_expected_until_its_next_hello():
    run = opened("a", "b", rules=Rules(rounds=1, patience=100))
    assert run.failed("a", 1)[0] == run_events.Failure(worker="a", round=1, reason="out of memory")
    assert run.state.needed == 1
    run.tick(20)
    assert not asked(run.seen("a"))
    assert asked(run.seen("a", hello=True)) == ["a"]
    assert run.state.needed == 2


def test_a_failure_is_forgotten_when_the_process_restarts():
    run = opened("a", "b")
    run.failed("a", 1)
    assert asked(run.seen("a", session="a-2")) == ["a"]  # its hello was lost


def test_a_failure_while_the_others_are_away_does_not_stop_the_run():
    run = opened("a", "b")
    run.failed("a", 1)
    run.tick(10)
    assert not run.state.workers
    assert asked(run.seen("b", hello=True)) == ["b"]
    assert only(run.update("b"), fx.Commit)


def test_a_chosen_worker_that_comes_back_is_asked_again():
    run = opened("a", "b", rules=Rules(rounds=1, fraction=0.5))
    (chosen,) = run.state.asked
    run.left(chosen)
    assert asked(run.seen(chosen)) == [chosen]


def test_a_failure_in_another_round_or_run_is_only_reported():
    run = opened("a", "b")
    run.failed("a", 7)
    run.on(ev.Failed(run.now, "a", "run-b", 1, "no disk"))
    assert not run.state.failed
    assert run.state.needed == 2


def test_if_every_worker_fails_the_run_stops_with_the_reason():
    run = opened("a", "b")
    run.failed("b", 1)
    run.failed("a", 1)
    assert run.state.outcome == "stopped"
    assert run.state.reason == "every worker failed in round 1; b: out of memory"


def test_if_all_that_a_sample_asked_fail_others_are_asked_at_once():
    run = opened("a", "b", "c", rules=Rules(rounds=1, sample=1))
    (first,) = run.state.asked
    run.now += 1
    run.at_work(first)  # its last heartbeat before the failure
    (second,) = asked(run.failed(first, 1))
    (third,) = asked(run.failed(second, 1))
    assert {first, second, third} == {"a", "b", "c"}
    run.update(third)
    assert run.state.phase is Phase.COMMITTING


@pytest.mark.parametrize("seed", range(8))
def test_who_did_not_answer_comes_last_at_every_reopening(seed):
    run = opened(*"abcde", rules=Rules(rounds=1, sample=1, seed=seed, deadline_s=30))
    for name in "abcde":
        run.seen(name, heartbeat_s=1e6)
    order = [*run.state.asked, *(name for _ in range(3) for name in asked(run.tick(30)))]
    assert len({*order}) == 4


def test_if_all_samples_fail_the_run_stops_with_the_reason():
    run = opened("a", "b", "c", rules=Rules(rounds=1, sample=1, max_reopenings=3))
    for _ in range(4):
        assert run.state.outcome is None
        (name,) = run.state.asked
        run.failed(name, 1)
    assert run.state.reason.startswith("every worker failed in round 1; ")
    run = opened("a", "b", "c", rules=Rules(rounds=1, sample=1, on_deadline="stop"))
    (name,) = run.state.asked
    run.failed(name, 1)
    assert run.state.outcome == "stopped"


# --- evaluations and the end -------------------------------------------------------------------


def second_round(*workers: str, **rules: Any) -> Run:
    run = opened(*workers, rules=Rules(rounds=2, min_workers=len(workers), **rules))
    for name in workers:
        run.update(name)
    run.committed(*workers)
    return run


def recorded(effects: fx.Effects) -> list[tuple[int, list[str]]]:
    return [(e.round, sorted(e.evaluations)) for e in only(effects, fx.RecordEvaluation)]


def test_the_first_work_asks_for_no_evaluation_and_the_second_does():
    run = second_round("a", "b")
    assert [fit.evaluate for fit in only(run.log, fx.SendFit)] == [False, True]


def test_an_evaluation_that_comes_while_a_round_is_committed_is_recorded():
    run = opened("a", "b", "c", rules=Rules(rounds=3, min_workers=3, quorum=Quorum(number=1)))
    run.update("a")
    run.committed("a")
    assert not recorded(run.update("a"))  # it has no held-out data
    assert not recorded(run.evaluation("b", 1))  # that of c may still come
    assert recorded(run.committed("a")) == [(1, ["b"])]
    assert run.state.evaluate_pending


def test_an_evaluation_is_recorded_once_all_have_sent_theirs():
    run = second_round("a", "b")
    assert not recorded(run.evaluation("a", 1))
    assert recorded(run.evaluation("b", 1)) == [(1, ["a", "b"])]
    assert not recorded(run.evaluation("b", 1))


def test_an_evaluation_is_recorded_at_the_commit_with_those_present():
    run = second_round("a", "b")
    run.evaluation("a", 1)
    run.update("a")
    effects = run.update("b")
    assert recorded(effects) == [(1, ["a"])]
    assert isinstance(effects[-1], fx.Commit)


def test_an_evaluation_of_another_model_is_not_mixed_in():
    run = second_round("a", "b")
    run.evaluation("a", 0)
    run.on(ev.EvaluationArrived(run.now, "run-b", 1, "a", rs.Evaluated(10, 0.5, {}), "b1"))
    assert not run.state.evaluations


def all_rounds_done(**rules: Any) -> Run:
    run = opened("a", "b", rules=Rules(rounds=1, **rules))
    for name in "ab":
        run.update(name)
    assert only(run.committed("a", "b"), fx.SendEvaluate) == [fx.SendEvaluate(("a", "b"))]
    return run


def test_after_the_last_round_its_model_is_evaluated_and_the_run_ends():
    run = all_rounds_done()
    run.evaluation("a", 1)
    effects = run.evaluation("b", 1)
    assert recorded(effects) == [(1, ["a", "b"])]
    assert only(effects, fx.End) == [fx.End("finished", "1 round is done", ("a", "b"))]
    assert run.tick(1000) == []
    assert rounds.wakeup(run.state) == math.inf


def test_the_last_evaluation_has_a_deadline():
    run = all_rounds_done(deadline_s=60, patience=1000)
    run.evaluation("a", 1)
    assert recorded(run.sleep()) == [(1, ["a"])]
    assert run.state.outcome == "finished"


@pytest.mark.parametrize("how", ["left", "failed"])
def test_workers_that_leave_or_fail_are_not_waited_for_at_the_end(how):
    run = all_rounds_done(quorum=Quorum(number=2))
    run.evaluation("a", 1)
    effects = run.left("b") if how == "left" else run.failed("b", 1)
    assert recorded(effects) == [(1, ["a"])]
    assert run.state.outcome == "finished"


def test_a_late_joiner_evaluates_too():
    run = all_rounds_done()
    assert asked(run.seen("c", hello=True)) == ["c"]


def test_at_the_end_workers_that_train_are_asked_again_and_those_that_evaluate_are_not():
    run = all_rounds_done(patience=100)
    run.tick(15)
    assert asked(run.at_work("a", "training")) == ["a"]
    assert not asked(run.at_work("b", "evaluating"))


# --- a coordinator that started again ----------------------------------------------------------


def resumed(rules: Rules | None = None, **start: Any) -> Run:
    rules = rules or Rules(rounds=3, min_workers=3)
    run = Run(rules, **{"committed": 1, "participants": "abc", "evaluated": False, **start})
    run.connect()
    return run


def test_a_resumed_run_waits_for_its_workers_but_not_for_ever():
    run = resumed()
    run.seen("a")
    assert run.state.phase is Phase.WAITING
    run.tick(9)
    run.seen("a")
    assert asked(run.tick(1)) == ["a"]


def test_a_resumed_run_opens_at_once_when_all_are_present():
    run = resumed()
    for name in "abc":
        run.seen(name)
    assert run.state.phase is Phase.OPEN


@pytest.mark.parametrize("quorum", [ALL, Quorum(number=3)])
def test_updates_from_before_the_resume_count(quorum):
    run = resumed(Rules(rounds=3, min_workers=3, quorum=quorum))
    for name in "bc":  # b has left since, for good
        run.update(name)
    assert not only(run.log, fx.Ack)
    run.seen("a")
    run.seen("c")
    run.tick(9)
    run.seen("a")
    run.seen("c")
    effects = run.tick(1)
    assert asked(effects) == ["a"]
    assert run.state.needed == 3
    assert only(run.update("a"), fx.Commit)


def test_an_update_from_before_the_resume_has_a_place_in_the_sample():
    run = resumed(Rules(rounds=3, min_workers=3, sample=2))
    run.update("b")
    for name in "acd":
        run.seen(name, hello=True)
    assert run.state.phase is Phase.OPEN
    assert len(run.state.asked) == 2
    assert "b" in run.state.asked


def test_a_resumed_round_asks_once_more_for_an_update_that_does_not_fit_its_settings():
    resumed = {"committed": 1, "participants": ("a", "b"), "base": "b1"}
    run = opened("a", "b", rules=Rules(rounds=3), **resumed)

    def does_not_fit() -> fx.Effects:
        run.arrived("a")
        return run.on(ev.FoldFailed(run.now, Ticket("a", run.state.round), "it has no tensor w"))

    (again,) = only(does_not_fit(), fx.SendFit)
    assert (again.workers, again.attempt) == (("a",), 1)
    assert not asked(does_not_fit())
    for name in "ab":
        run.update(name)
    run.committed("a", "b")
    assert not asked(does_not_fit())


def test_evaluations_from_before_the_resumed_round_opens_count():
    run = resumed()
    run.update("a")
    assert not recorded(run.evaluation("a", 1))  # the others were not heard yet
    for name in "abc":
        run.seen(name)
    run.evaluation("b", 1)
    assert recorded(run.evaluation("c", 1)) == [(1, ["a", "b", "c"])]


def test_a_resumed_run_does_not_spin_while_nobody_joins():
    run = resumed(Rules(rounds=3, wait_s=3600))
    run.sleep()
    assert rounds.wakeup(run.state) == 100.0 + 3600
    run.sleep()
    assert run.state.outcome == "stopped"


def test_a_numeric_quorum_is_not_lowered_for_a_resumed_run():
    run = resumed(Rules(rounds=3, min_workers=3, quorum=Quorum(number=2), deadline_s=60))
    run.tick(9)
    run.seen("a")
    run.tick(1)
    assert not only(run.update("a"), fx.Commit)
    assert asked(run.seen("b")) == ["b"]
    assert only(run.update("b"), fx.Commit)


def test_a_run_resumed_for_its_last_evaluation_waits_to_hear_its_workers():
    run = resumed(Rules(rounds=1, min_workers=3))
    assert run.state.phase is Phase.EVALUATING
    assert asked(run.seen("a")) == ["a"]
    assert not only(run.evaluation("a", 1), fx.End)
    assert asked(run.seen("b")) == ["b"]
    assert not run.tick(9)
    run.seen("a")
    run.seen("b")
    run.tick(1)
    effects = run.evaluation("b", 1)
    assert recorded(effects) == [(1, ["a", "b"])]
    assert only(effects, fx.End) == [fx.End("finished", "1 round is done", ("a", "b", "c"))]


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_that_is_done_ends_without_workers_when_it_is_resumed(evaluated):
    run = resumed(Rules(rounds=1), evaluated=evaluated)
    assert run.state.outcome is None
    run.sleep()
    assert run.now == 110.0
    assert run.state.outcome == "finished"


def test_a_run_that_is_done_ends_once_it_has_told_all_its_workers():
    run = resumed(
        Rules(rounds=1),
        evaluated=True,
        announced=Table({"a": 10, "d": 10}),
        asked_in=Table({"e": 1}),
    )
    for name in "acde":
        assert not asked(run.seen(name))
    assert run.state.outcome is None
    waiting = waiting_for(run.state, run.now)
    assert waiting is not None
    assert waiting.reason == "the run is done; waiting to inform b"
    assert only(run.seen("b"), fx.End) == [fx.End("finished", "1 round is done", tuple("abcde"))]


def test_a_resumed_run_tells_its_end_to_workers_that_it_has_not_heard_yet():
    run = resumed(
        Rules(rounds=2, min_workers=1), announced=Table({"d": 10}), asked_in=Table({"e": 1})
    )
    assert asked(run.seen("a")) == ["a"]
    run.update("a")
    run.committed("a")
    effects = run.evaluation("a", 2)
    assert only(effects, fx.End) == [fx.End("finished", "2 rounds are done", tuple("abcde"))]


def test_a_run_that_is_done_says_at_once_whom_it_waits_for():
    run = Run(Rules(rounds=1), committed=1, participants="abc", evaluated=True)
    (waiting,) = only(run.connect(), run_events.Waiting)
    assert waiting.reason == "the run is done; waiting up to 10 s to inform a, b, c"


def test_time_before_the_first_link_does_not_count():
    run = Run(Rules(rounds=3, min_workers=2, wait_s=60), committed=1)
    run.now += 3600
    run.disconnect()  # for a standby, each attempt ends so
    run.now += 30
    run.connect()
    run.seen("a")
    assert run.state.phase is Phase.WAITING
    run.seen("b")
    assert run.state.phase is Phase.OPEN


# --- time --------------------------------------------------------------------------------------


def check_wakeup(state: rs.State) -> None:
    """Check that a tick at ``wakeup`` changes something; otherwise, the shell would spin."""
    due = rounds.wakeup(state)
    if due < math.inf:
        after, _ = rounds.advance(state, ev.Tick(due))
        assert after != state
        assert rounds.wakeup(after) > due


_STEPS = {
    "seen": lambda run, name: run.seen(name),
    "hello": lambda run, name: run.seen(name, hello=True),
    "at work": lambda run, name: run.at_work(name),
    "left": lambda run, name: run.left(name),
    "failed": lambda run, name: run.failed(name, run.asked_round(name)),
    "update": lambda run, name: run.state.answer(name) is None and run.update(name),
    "evaluation": lambda run, name: run.evaluation(name, run.state.round - 1),
    "committed": lambda run, _: (
        run.state.phase is Phase.COMMITTING
        and run.committed(*(ticket.worker for ticket in run.state.received))
    ),
    "disconnect": lambda run, _: run.disconnect(),
    "connect": lambda run, _: run.state.link or run.connect(),
    "tick": lambda run, _: run.tick(3.0),
    "sleep": lambda run, _: math.isinf(rounds.wakeup(run.state)) or run.sleep(),
}


@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(_STEPS)), st.sampled_from("abc")), max_size=40),
    rules=st.builds(
        Rules,
        rounds=st.integers(1, 3),
        min_workers=st.integers(1, 3),
        quorum=st.sampled_from([ALL, Quorum(number=2), Quorum(fraction=0.5)]),
        grace_s=st.sampled_from([0.0, 4.0, 50.0]),
        deadline_s=st.sampled_from([7.0, 30.0]),
        on_deadline=st.sampled_from(["reopen", "close", "stop"]),
        fraction=st.sampled_from([1.0, 0.5]),
        wait_s=st.sampled_from([20.0, 100.0]),
    ),
    committed=st.integers(0, 3),
)
def test_a_tick_at_wakeup_always_changes_something(steps, rules, committed):
    run = Run(rules, committed=committed, evaluated=committed == 0)
    for step, name in steps:
        _STEPS[step](run, name)
        check_wakeup(run.state)


def test_there_is_no_wakeup_without_a_link():
    run = opened("a", "b")
    run.disconnect()
    assert rounds.wakeup(run.state) == math.inf
