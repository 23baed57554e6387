"""The fold of events into a view of a run: what it keeps and what it drops."""

from __future__ import annotations

from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.state import Issued, Phase, State, Table, Worker
from fluffle_coordinator.machine.state import Rules as RoundRules
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.waiting import waiting_for
from tests import history_lines
from tests.history_lines import participant


def view_of(*events: RunEvent, whole: bool = False) -> RunView:
    """Return the view of events, one per second from 100 s on."""
    view = RunView(whole=whole)
    for second, event in enumerate(events, start=100):
        view.add(float(second), event)
    return view


def opened(number: int, *asked: str) -> run_events.Opened:
    return run_events.Opened(round=number, asked=asked, needed=len(asked), deadline_s=60.0)


def counted(number: int, worker: str) -> run_events.Counted:
    return run_events.Counted(round=number, worker=worker, num_examples=5)


def committed(number: int) -> run_events.Committed:
    return run_events.Committed(round=number, participants=("a",))


def rejected(number: int | None = None) -> run_events.Rejected:
    return run_events.Rejected(reason="NaN", round=number)


def test_a_round_from_its_opening_to_its_commit():
    view = view_of(opened(1, "a", "b"), counted(1, "a"))
    one = view.open
    assert one is not None
    assert (one.number, one.opened_at, one.deadline_at) == (1, 100.0, 160.0)
    assert (view.phase, view.committed, view.next) == ("open", 0, 1)
    assert one.answers["a"] == (101.0, counted(1, "a"))
    assert one.after_s(101.0) == 1.0
    view.add(110.0, committed(1))
    assert (view.open, view.phase, view.committed, view.next) == (None, "waiting", 1, 2)
    assert one.committed_at == 110.0


def test_a_reopening_does_not_change_how_long_an_update_took():
    again = run_events.Reopened(round=1, asked=("b",), needed=2, reason="too few")
    one = view_of(opened(1, "a", "b"), counted(1, "a"), again, counted(1, "b")).rounds[1]
    assert {key: one.after_s(at) for key, (at, _) in one.answers.items()} == {"a": 1.0, "b": 3.0}


def test_an_outage_postpones_the_deadline():
    outage = (run_events.Disconnected(), run_events.Waiting(), run_events.Reconnected())
    view = view_of(opened(1, "a"), *outage)
    assert view.open is not None
    assert view.open.deadline_at == 162.0


def test_a_block_postpones_the_deadline():
    blocked, unblocked = run_events.Blocked(reason="memory"), run_events.Unblocked()
    for events in (
        (blocked, blocked, run_events.Waiting(), unblocked),
        (blocked, run_events.Disconnected(), run_events.Waiting(), run_events.Reconnected()),
    ):
        view = view_of(opened(1, "a"), *events)
        assert view.open is not None
        assert view.open.deadline_at == 163.0


def test_an_event_without_a_round_belongs_to_the_open_one():
    view = view_of(rejected(), opened(1, "a"), rejected(), rejected(9), committed(1), rejected())
    assert [note.at for note in view.before.notes] == [100.0]
    assert [note.at for note in view.rounds[1].notes] == [102.0, 103.0]
    assert 9 not in view.rounds  # invalid messages create no rounds


def test_updates_counted_between_a_restart_and_the_opening_belong_to_the_round():
    resumed = run_events.Resumed(run="r", rounds=3, round=0)
    view = view_of(opened(1, "a", "b"), counted(1, "a"), resumed, counted(1, "b"))
    assert set(view.rounds[1].answers) == {"b"}
    view.add(104.0, opened(1, "a", "b"))
    ((at, update),) = view.rounds[1].answers.values()
    assert (update.worker, view.rounds[1].after_s(at)) == ("b", 0.0)
    view = view_of(resumed, counted(1, "b"), opened(1, "a", "b"))  # a new live page
    assert set(view.rounds[1].answers) == {"b"}


def test_a_run_that_goes_back_a_round_counts_again():
    resumed = run_events.Resumed(run="r", rounds=3, round=1)
    view = view_of(*(e for n in (1, 2) for e in (opened(n, "a"), counted(n, "a"), committed(n))))
    view.add(109.0, run_events.Evaluated(round=2, loss=0.5))
    view.add(110.0, resumed)
    assert (view.committed, view.next, view.done) == (1, 2, [view.rounds[1]])
    view.add(111.0, opened(2, "a"))
    assert view.rounds[2].loss is None
    assert [set(view.rounds[number].answers) for number in (1, 2)] == [{"a"}, set()]
    view.add(112.0, opened(2, "a"))  # without a restart in the journal
    assert view.open is view.rounds[2]


def test_another_run_resets_the_view():
    view = view_of(
        run_events.Started(run="r", rounds=3), opened(1, "a"), run_events.Started(run="s")
    )
    assert (view.run, view.planned, view.rounds, view.open) == ("s", None, {}, None)
    view.add(200.0, opened(1, "a"), "s")
    view.add(201.0, opened(1, "a"), "t")
    assert view.run == "t"


def test_a_whole_view_keeps_events_before_the_opening_of_their_round():
    view = view_of(rejected(2), opened(1, "a"), committed(1), opened(2, "a"), whole=True)
    assert set(view.rounds) == {1, 2}
    assert len(view.rounds[2].notes) == 1


def test_it_is_bounded():
    view = view_of(*(event for n in range(1, 2101) for event in (opened(n, "a"), committed(n))))
    assert len(view.rounds) == 2000
    assert min(view.rounds) == 101
    named = [run_events.Refused(worker=f"w{number}") for number in range(1100)]
    notes = view_of(opened(1, "a"), *named).rounds[1].notes
    assert [note.worker for note in notes] == [event.worker for event in named[100:]]
    view = view_of(*(run_events.Gone(worker=f"w{number}") for number in range(10_100)))
    assert len(view.workers.departed) == 10_000
    assert "w0" not in view.workers.departed


def test_old_rounds_keep_only_their_result():
    rounds = range(1, 61)
    view = view_of(*(e for n in rounds for e in (opened(n, "a"), counted(n, "a"), committed(n))))
    assert sum(bool(one.answers) for one in view.rounds.values()) == 50
    assert view.rounds[1].participants == ("a",)


def history(number: int, **more: Any) -> dict[str, Any]:
    there = participant("a", seconds=2.0, counted_s=3.0, bytes=40)
    return history_lines.committed(number, there, asked=["a", "b"], **more)


def test_a_history_and_the_events_of_a_round_give_the_same_view():
    folded = view_of(
        run_events.Opened(round=1, asked=("a", "b"), needed=1),
        run_events.Counted(round=1, worker="a", num_examples=5, train_s=2.0, bytes=40),
        run_events.Late(round=1, worker="b"),
        run_events.Committed(round=1, participants=("a",), num_examples=5, timings={"open_s": 5.0}),
        run_events.Evaluated(round=1, loss=0.5, num_examples=3, metrics={"accuracy": 0.75}),
    )
    remembered = RunView()
    line = history(1, timings={"open_s": 5.0}, loss=0.5, accuracy=0.75)
    late = history(2, late_updates=[{"worker": "b", "round": 1}], late=1)
    remembered.remember([line | {"num_examples": 3}, late])
    for view in (folded, remembered):
        one = view.rounds[1]
        assert (one.asked, one.participants, one.num_examples) == (("a", "b"), ("a",), 5)
        assert one.came_late == {"b"}
        assert one.answers["a"][1].bytes == 40
        assert (one.loss, one.metrics, one.evaluated_on) == (0.5, {"accuracy": 0.75}, 3)
        assert one.phases is not None
        assert sum(one.phases.values()) == 5.0
    assert remembered.rounds[1].asked_at == 10.0
    assert (remembered.committed, remembered.next) == (2, 3)


def test_the_coordinators_test_is_shown_with_the_federated_evaluation():
    tested = run_events.Tested(round=1, metrics={"accuracy": 0.5})
    evaluated = run_events.Evaluated(round=1, loss=0.5, metrics={"accuracy": 0.75})
    view = view_of(opened(1, "a"), committed(1), tested, evaluated).rounds[1]
    assert view.metrics == {"accuracy": 0.75, "test/accuracy": 0.5}
    remembered = RunView()
    remembered.remember([history(1) | {"test/accuracy": 0.5}])
    assert remembered.rounds[1].metrics == {"test/accuracy": 0.5}
    assert not remembered.rounds[1].evaluated


def test_personal_metrics_are_shown_with_the_federated_evaluation():
    personal = run_events.Personal(round=1, metrics={"personal_loss": 0.25})
    evaluated = run_events.Evaluated(round=1, loss=0.5, metrics={"accuracy": 0.75})
    view = view_of(opened(1, "a"), committed(1), personal, evaluated).rounds[1]
    assert view.metrics == {"personal_loss": 0.25, "accuracy": 0.75}
    remembered = RunView()
    remembered.remember([history(1) | {"personal_loss": 0.25}])
    assert remembered.rounds[1].metrics == {"personal_loss": 0.25}


def test_a_history_creates_only_workers_that_were_asked():
    view = RunView()
    view.remember([history(1, rejected=1, rejections=[{"worker": "mallory", "reason": "NaN"}])])
    assert view.workers.get("mallory") is None
    assert [(row.name, row.counted, row.state) for row in view.workers.in_order()] == [
        ("a", 1, "gone"), ("b", 0, "gone"),
    ]  # fmt: skip
    assert view.counters.rounds == 0  # the counters start with the first live event


def test_a_long_history_makes_room_for_its_last_rounds_only(monkeypatch):
    made: list[int | None] = []
    room = RunView._round
    monkeypatch.setattr(RunView, "_round", lambda view, n: made.append(n) or room(view, n))
    early = history(1, rejections=[{"worker": "a", "reason": "NaN"}])
    view = RunView()
    view.remember([early, *(history(number) for number in range(2, 2101))])
    assert made == list(view.rounds) == list(range(101, 2101))
    assert view.workers["a"].counted == 2100
    assert [(at, during) for at, during, _ in view.rejections] == [(15.0, 1)]


def test_a_whole_history_keeps_every_round_in_full():
    rows = [history(number) for number in range(1, 71)]
    for whole, count in ((True, 70), (False, 50)):
        view = RunView(whole=whole)
        view.remember(rows)
        assert len(view.detailed) == sum(bool(one.answers) for one in view.done) == count


def test_the_waiting_event_contains_the_facts():
    training = Worker(
        "a", "s", 5, (), 2.0, last_seen=8.0, state="training", run="r", round=4, step=3, steps=8
    )
    asked = Table({"a": Issued(1.0, 4, 4), "b": Issued(1.0, 4, 4)})
    workers = Table({"a": training})
    state = State(
        RoundRules(6), "r", 4, QUORUM, phase=Phase.OPEN, link=1, workers=workers, asked=asked
    )
    waiting = waiting_for(state, 10.0)
    assert waiting is not None
    assert (waiting.what, waiting.round, waiting.short) == ("updates", 4, 0)
    assert waiting.fields()["missing"] == [
        {"worker": "a", "state": "training", "step": 3, "steps": 8},
        {"worker": "b", "state": "gone"},
    ]


def test_of_many_missing_workers_the_first_are_named_and_the_others_counted():
    names = [f"w{number:03}" for number in range(500)]
    workers = Table(
        {n: Worker(n, "s", 5, (), 2.0, state="idle", last_seen=8.0) for n in names[:30]}
    )
    asked = Table({name: Issued(1.0, 4, 4) for name in names})
    state = State(
        RoundRules(6), "r", 4, QUORUM, phase=Phase.OPEN, link=1, workers=workers, asked=asked
    )
    waiting = waiting_for(state, 10.0)
    assert waiting is not None
    assert len(waiting.fields()["missing"]) == 500
    first = ", ".join(f"{name} idle (last heartbeat 2 s ago)" for name in names[:12])
    assert f"{first}, and 488 more (18 idle, 470 gone)" in waiting.sentence()


def test_the_coordinators_test_is_shown_with_the_federated_metrics():
    view = view_of(
        committed(1),
        run_events.Tested(round=1, metrics={"accuracy": 0.25}),
        run_events.Evaluated(round=1, loss=0.5, metrics={"accuracy": 0.75}),
    )
    (one,) = view.done
    assert one.metrics == {"test/accuracy": 0.25, "accuracy": 0.75}
