"""The worker's state machine under any order of events."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fluffle_worker import machine as s
from fluffle_worker.machine import State, Work

works = st.builds(
    Work,
    st.sampled_from(["init", "fit", "evaluate"]),
    st.sampled_from(["run-1", "run-2"]),
    st.integers(0, 3),
    st.sampled_from(["base-1", "base-2"]),
    st.integers(0, 2),
    st.integers(1, 2),
)

_KINDS = ("init", "fit", "evaluate")


def later(one: Work, other: Work) -> bool:
    """Return whether one work belongs to the same run as the other and comes later."""
    return one.run == other.run and _place(one) > _place(other)


def _place(work: Work) -> tuple[int, ...]:
    return work.round, _KINDS.index(work.kind), work.sequence, work.attempt


class Worker(RuleBasedStateMachine):
    """A model of a worker around the machine: its thread, its kept answers, and a broker.

    It carries out the machine's effects and checks that each of them is possible.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.thread: Work | None = None
        self.unwanted = False  # the work in the thread was abandoned
        self.answers: dict[Work, int] = {}  # which answer, by the number of its making
        self.to_broker: set[Work] = set()
        self.taken: dict[Work, int] = {}
        self.made = 0
        self.begun = 0
        self.ended = 0
        self.over: str | None = None

    def event(self, event: s.Event) -> list[s.Effect]:
        self.state, effects = s.advance(self.state, event)
        for effect in effects:
            match effect:
                case s.Begin(work):
                    assert self.thread is None, "two works in the thread"
                    assert not self.answers, "an answer is kept while newer work begins"
                    self.thread, self.unwanted = work, False
                    self.begun += 1
                case s.Abandon(work):
                    assert work == self.thread
                    self.unwanted = True
                case s.Send(work):
                    assert work in self.answers, "there is no answer to send"
                    assert not self.unwanted or self.over
                    self.to_broker.add(work)
                case s.Drop(work):
                    self.answers.pop(work, None)
                    self.taken.pop(work, None)
                    self.to_broker.discard(work)
                case s.Report(_, reason):
                    assert isinstance(event, s.Failed)
                    assert reason == event.reason
                case s.Leave(reason):
                    assert isinstance(event, s.Stopped)
                    assert reason == event.reason
        return effects

    def leave_thread(self) -> Work:
        work = self.thread
        assert work is not None
        self.thread = None
        self.ended += 1
        return work

    @initialize(work=works)
    def first(self, work: Work) -> None:
        assert self.event(s.Asked(work)) == [s.Begin(work)]

    @rule(work=works)
    def asked(self, work: Work) -> None:
        before, busy = self.state, self.thread
        effects = self.event(s.Asked(work))
        known = (before.doing, before.next, before.sending)
        if work in known:
            assert effects == []
            assert self.state == before
        elif work == before.answered:
            # The very same answer, and nothing is done anew.
            assert effects == [s.Send(work)]
            assert self.answers[work] == self.taken[work]
        elif any(later(one, work) for one in known if one is not None):
            assert effects == []
            assert self.state == before
        elif busy is None:
            assert effects[-1] == s.Begin(work)
        else:
            assert effects[-1] == s.Abandon(busy)
            assert self.state.next == work

    @rule(data=st.data())
    def asked_again(self, data: st.DataObject) -> None:
        known = [
            w
            for w in (self.state.doing, self.state.next, self.state.sending, self.state.answered)
            if w is not None
        ]
        if known:
            self.asked(data.draw(st.sampled_from(known)))

    @precondition(lambda self: self.thread is not None)
    @rule()
    def finished(self) -> None:
        work = self.leave_thread()
        wanted = not self.unwanted
        self.made += 1
        self.answers[work] = self.made
        begun = self.begun
        effects = self.event(s.Finished(work))
        if wanted:
            assert effects == [s.Send(work)]
        elif not self.over:
            # It was finished before it noticed; nobody wants it any more.
            assert effects[0] == s.Drop(work)
            assert self.begun == begun + 1

    @precondition(lambda self: self.thread is not None)
    @rule()
    def failed(self) -> None:
        work = self.leave_thread()
        effects = self.event(s.Failed(work, "the data is gone"))
        assert s.Drop(work) in effects
        assert s.Report(work, "the data is gone") in effects

    @precondition(lambda self: self.thread is not None and self.unwanted)
    @rule()
    def abandoned(self) -> None:
        work = self.leave_thread()
        effects = self.event(s.Abandoned(work))
        assert effects[0] == s.Drop(work)
        assert not any(isinstance(effect, s.Send | s.Report) for effect in effects)

    @precondition(lambda self: bool(self.to_broker))
    @rule()
    def sent(self) -> None:
        (work,) = self.to_broker
        assert work == self.state.sending
        self.to_broker.discard(work)
        self.taken[work] = self.answers[work]
        assert self.event(s.Sent(work)) == []
        assert self.state.answered == work

    @rule(work=works)
    def rejected(self, work: Work) -> None:
        """A rejected answer is discarded, so that the work is repeated when requested again."""
        before = self.state
        effects = self.event(s.Rejected(work.run, work.round, work.base, work.sequence))
        answered = before.answered
        if answered is not None and answered == work._replace(kind="fit", attempt=answered.attempt):
            assert effects == [s.Drop(answered)]
            assert self.state == before._replace(answered=None)
        else:
            assert effects == []
            assert self.state == before

    @precondition(lambda self: self.state.answered is not None)
    @rule()
    def answer_rejected(self) -> None:
        self.rejected(self.state.answered)

    @rule(work=works, what=st.sampled_from([s.Finished, s.Abandoned, s.Sent, None]))
    def something_stale(self, work: Work, what: type[s.Finished | s.Abandoned | s.Sent]) -> None:
        """An event about work that is not under way, such as a late confirmation."""
        if work in (self.state.doing, self.state.sending):
            return
        before = self.state
        assert self.event(what(work) if what else s.Failed(work, "stale")) == []
        assert self.state == before

    @rule()
    def stopped(self) -> None:
        busy = self.thread
        effects = self.event(s.Stopped("the run is finished"))
        self.over = "the run is finished"
        expected: list[s.Effect] = [s.Leave("the run is finished")]
        assert effects == ([s.Abandon(busy), *expected] if busy else expected)
        assert self.state.next is None

    @invariant()
    def the_machine_knows_what_is_there(self) -> None:
        state = self.state
        assert state.doing == self.thread
        assert state.next is None or state.doing is not None
        assert state.sending is None or state.sending in self.to_broker
        assert {state.sending} - {None} == self.to_broker
        assert self.answers.keys() == {state.sending, state.answered} - {None}
        assert state.over == self.over

    @invariant()
    def at_most_one_work_is_under_way(self) -> None:
        state = self.state
        assert [state.doing, state.sending, state.answered].count(None) >= 2

    @invariant()
    def nothing_begun_is_forgotten(self) -> None:
        assert self.begun - self.ended == (self.thread is not None)


TestSession = Worker.TestCase


def run(*events: s.Event) -> tuple[State, list[s.Effect]]:
    state, effects = State(), []
    for event in events:
        state, done = s.advance(state, event)
        effects += done
    return state, effects


def fit(number: int, run: str = "r", base: str = "b") -> Work:
    return Work("fit", run, number, base)


def test_work_is_done_and_its_answer_kept():
    state, effects = run(s.Asked(fit(1)), s.Finished(fit(1)), s.Sent(fit(1)))
    assert effects == [s.Begin(fit(1)), s.Send(fit(1))]
    assert state == State(answered=fit(1))


def test_newer_work_waits_until_the_thread_is_free():
    state, effects = run(s.Asked(fit(1)), s.Asked(fit(2)))
    assert effects == [s.Begin(fit(1)), s.Abandon(fit(1))]
    assert state == State(doing=fit(1), next=fit(2))
    state, effects = s.advance(state, s.Abandoned(fit(1)))
    assert effects == [s.Drop(fit(1)), s.Begin(fit(2))]
    assert state == State(doing=fit(2))


def test_of_several_that_wait_only_the_newest_begins():
    events = [s.Asked(fit(n)) for n in (1, 2, 4, 3)]
    state, effects = run(*events, s.Abandoned(fit(1)))
    assert [e.work.round for e in effects if isinstance(e, s.Begin)] == [1, 4]
    assert [e.work.round for e in effects if isinstance(e, s.Drop)] == [2, 1]
    assert state == State(doing=fit(4))


def test_newer_work_lets_go_of_an_answer_the_broker_has_not_taken():
    state, effects = run(s.Asked(fit(1)), s.Finished(fit(1)), s.Asked(fit(2)), s.Sent(fit(1)))
    assert effects[2:] == [s.Drop(fit(1)), s.Begin(fit(2))]
    assert state == State(doing=fit(2))


def test_the_last_evaluation_comes_after_the_last_training():
    last = Work("evaluate", "r", 3)
    assert run(s.Asked(fit(3)), s.Asked(last))[0].next == last
    assert run(s.Asked(last), s.Asked(fit(3)))[0] == State(doing=last)


def test_another_run_is_neither_newer_nor_older():
    state, effects = run(s.Asked(fit(9, "old")), s.Asked(fit(1, "new")))
    assert effects[-1] == s.Abandon(fit(9, "old"))
    assert state.next == fit(1, "new")


def test_a_failed_work_can_be_asked_again():
    state, effects = run(s.Asked(fit(1)), s.Failed(fit(1), "no disk"), s.Asked(fit(1)))
    assert effects == [
        s.Begin(fit(1)),
        s.Drop(fit(1)),
        s.Report(fit(1), "no disk"),
        s.Begin(fit(1)),
    ]
    assert state.doing == fit(1)


def test_a_coordinator_that_fell_back_a_round_is_followed():
    # Its last checkpoint was damaged: the same run goes on from an earlier round.
    state, effects = run(s.Asked(fit(3)), s.Finished(fit(3)), s.Sent(fit(3)), s.Asked(fit(2)))
    assert effects[2:] == [s.Drop(fit(3)), s.Begin(fit(2))]
    assert state.doing == fit(2)


def test_the_same_round_from_other_weights_is_other_work():
    # A coordinator died before its average was on disk; the next has averaged again.
    lost, found = fit(2, base="lost"), fit(2, base="found")
    state, effects = run(s.Asked(lost), s.Asked(found), s.Abandoned(lost))
    assert effects == [s.Begin(lost), s.Abandon(lost), s.Drop(lost), s.Begin(found)]
    assert state == State(doing=found)
    state, effects = run(s.Asked(lost), s.Finished(lost), s.Sent(lost), s.Asked(found))
    assert effects[2:] == [s.Drop(lost), s.Begin(found)]
    assert state == State(doing=found)


@pytest.mark.parametrize("end", [s.Finished(fit(1)), s.Abandoned(fit(1)), s.Failed(fit(1), "x")])
def test_nothing_begins_after_the_end_of_the_run(end):
    _, effects = run(s.Asked(fit(1)), s.Asked(fit(2)), s.Stopped("enough"), end)
    assert [e.work for e in effects if isinstance(e, s.Begin)] == [fit(1)]


def test_states_are_values():
    before = State(doing=fit(1))
    s.advance(before, s.Asked(fit(2)))
    assert before == State(doing=fit(1))
