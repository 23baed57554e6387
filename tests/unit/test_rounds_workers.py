"""The rules about workers: silence, the weight of updates, stalls, samples and votes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import machine as rounds
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.state import Phase, Quorum, Rules, Table, Ticket
from fluffle_coordinator.observe.waiting import WaitingReport, in_brief, missing, waiting_for
from tests.unit.test_rounds import RUN, Run, asked, event_names, only, pass_time, resumed, update

FLOAT32 = ModelForm(digest="aa", summary="8 tensors, 61,706 parameters: float32 8")
FLOAT64 = ModelForm(digest="bb", summary="8 tensors, 61,706 parameters: float64 8")


def heard(*workers: str, rules: Rules | None = None) -> Run:
    """Return a run with an open round, whose clock stops while nobody is heard."""
    run = Run(rules or Rules(rounds=2), hearing=True)
    run.connect()
    for name in workers:
        run.seen(name, hello=True)
    assert run.state.phase is Phase.OPEN
    return run


# --- silence and presence ----------------------------------------------------------------------


@pytest.mark.parametrize("stopped_s", [12.0, 15.0, 3600.0])
def test_a_stopped_coordinator_makes_no_worker_gone(stopped_s):
    run = heard("a", "b", "c")
    run.update("a")
    run.now += stopped_s
    effects = run.tick()  # a tick before any message is read
    for name in "abc":  # then the messages that waited are read one by one
        effects += [*run.seen(name), *run.tick()]
    effects += [*run.echo(), *run.tick()]
    assert "gone" not in event_names(effects)
    assert not only(effects, fx.Commit)
    assert len(run.state.workers) == 3


def test_a_silence_that_ends_with_the_loss_of_the_link_does_not_count():
    run = heard("a", "b", rules=Rules(rounds=2, deadline_s=30))
    deadline_at = run.state.opened_at + 30
    run.tick(20)  # the broker blocks, so that not even the coordinator's echo comes back
    run.disconnect()
    run.now += 15
    assert event_names(run.connect()) == ["reconnected"]
    assert run.state.opened_at + 30 == deadline_at + 35


@pytest.mark.parametrize("timeout_s", [None, 120.0])
@pytest.mark.parametrize("tenths", [10, 82, 137])
def test_a_tick_when_a_stall_is_due_reports_it(timeout_s, tenths):
    run = Run(Rules(rounds=2, min_workers=1, stall_s=120.0, stall_timeout_s=timeout_s))
    run.now = tenths * 0.1
    run.connect()
    run.seen("a", hello=True, heartbeat_s=1e6)
    run.seen("a", heartbeat_s=1e6, state="training", run=RUN, round=1, step=1, steps=10)
    names = event_names(run.sleep())
    assert "stalled" in names
    assert ("failure" in names) == (timeout_s is not None)
    assert rounds.wakeup(run.state) > run.now


def test_what_a_round_waits_for_fits_a_narrow_terminal():
    run = heard("a", "b", "c", rules=Rules(rounds=1))
    run.update("a")
    assert missing(run.state, run.now).startswith("b idle (last heartbeat ")
    assert in_brief(run.state, run.now) == "round 1: 2 idle"


def test_a_worker_whose_training_stalled_is_replaced_when_the_round_is_reopened():
    limits = {"deadline_s": 60, "stall_s": 5, "stall_timeout_s": 10}
    run = Run(Rules(rounds=1, min_workers=3, sample=2, quorum=Quorum(number=2), **limits))
    run.connect()
    for name in "abc":
        run.seen(name, hello=True, heartbeat_s=1e6)
    first, second = sorted(run.state.asked)
    (third,) = {*"abc"} - {first, second}
    run.update(first)
    run.now += 1
    run.seen(second, heartbeat_s=1e6, state="training", run=RUN, round=1, step=1, steps=9)
    pass_time(run, 20)
    assert second in run.state.failed
    assert asked(pass_time(run, 45)) == [third]


def test_a_round_waits_no_longer_than_it_may_stay_open():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60, max_round_s=90))
    pass_time(run, 61, heard="ab")
    assert run.state.opened_at > run.state.began_at
    waiting = waiting_for(run.state, run.now)
    assert waiting is not None
    assert ", 29 s to the deadline;" in waiting.reason


def test_all_texts_name_the_same_number_of_workers_once_a_resumed_run_opens_with_fewer():
    run = resumed(Rules(rounds=9, quorum=Quorum(number=2), min_workers=2, wait_s=60))
    for _ in range(2):  # after 10 s, one worker is enough to open the round, but not to close it
        waiting = waiting_for(run.state, run.now)
        assert waiting is not None
        assert waiting.reason == "waiting for workers: 0 of 2 are connected (nobody)"
        assert in_brief(run.state, run.now) == "workers: 0 of 2 connected"
        run.tick(15)
    assert run.state.workers_needed == 1
    run.tick(60)
    assert run.state.reason == "0 of 2 workers joined in 60 s (--wait-workers)"


def test_a_round_that_opens_with_too_few_workers_for_its_quorum_reports_that_at_once():
    short = heard("a", "b", rules=Rules(rounds=2, quorum=Quorum(number=3)))
    waiting = WaitingReport(30.0, short.now).due(short.state, short.now, had_effects=True)
    assert waiting is not None
    assert (waiting.round, waiting.short) == (1, 1)
    enough = heard("a", "b", rules=Rules(rounds=2, quorum=Quorum(number=2)))
    assert WaitingReport(30.0, enough.now).due(enough.state, enough.now, had_effects=True) is None


@pytest.mark.parametrize(("left_s", "words"), [(592, "9 min 52 s"), (59, "59 s"), (5, "5 s")])
def test_the_time_to_the_deadline_has_the_units_of_explain(left_s, words):
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=left_s))
    waiting = waiting_for(run.state, run.now)
    assert waiting is not None
    assert f"updates, {words} to the deadline;" in str(waiting.reason)


def test_the_deadline_that_is_shown_does_not_pass_while_nobody_is_heard():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60))
    pass_time(run, 10, "ab")

    def shown() -> str:
        waiting = waiting_for(run.state, run.now)
        assert waiting is not None
        assert waiting.reason is not None
        return waiting.reason.split(";")[0]

    assert shown() == "round 1: 0 of 2 updates, 50 s to the deadline"
    paused = ", which is paused: the broker has delivered no heartbeat for "
    for silent_s in (1000, 2000):
        run.now += 1000
        assert shown() == f"round 1: 0 of 2 updates, 50 s to the deadline{paused}{silent_s} s"
    run.seen("a")  # postpones the deadline by the silence
    assert shown() == "round 1: 0 of 2 updates, 50 s to the deadline"


def test_a_worker_that_was_silent_before_the_coordinator_was_stopped_is_heard_first():
    run = heard("a", "b")
    limit_s = run.state.workers["b"].deadline(run.state.rules) - run.now
    pass_time(run, limit_s - 1, "a")
    run.now += 15.0
    effects = run.tick()
    assert rounds.wakeup(run.state) == math.inf  # no timer runs until somebody is heard
    effects += [*run.seen("a"), *run.tick()]  # what b has sent waits to be read
    assert "gone" not in event_names(effects)
    assert "gone" not in event_names([*run.seen("b"), *run.tick()])
    assert len(run.state.workers) == 2


def test_the_deadline_does_not_pass_while_the_coordinator_is_stopped():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60, on_deadline="stop"))
    pass_time(run, 50, "ab")
    run.now += 1000
    run.tick()
    pass_time(run, 4, "ab")
    assert run.state.phase is Phase.OPEN
    pass_time(run, 8, "ab")
    assert run.state.outcome == "stopped"


def test_a_worker_silent_while_others_are_heard_is_gone_and_the_smaller_quorum_is_reported():
    run = heard("a", "b", "c")
    run.update("a")
    effects = pass_time(run, 12, "ab")
    assert only(effects, run_events.RunEvent)[:2] == [
        run_events.Gone(worker="c", silent_s=10.0),
        run_events.Quorum(round=1, needed=2, was=3, reason="c is gone"),
    ]
    assert only(run.update("b"), fx.Commit)


def test_the_echo_alone_keeps_the_clock_running():
    run = heard("a", "b")
    effects = pass_time(run, 12)
    assert [effect.worker for effect in only(effects, run_events.Gone)] == ["a", "b"]


def test_of_many_workers_that_are_gone_at_once_the_first_are_named():
    run = heard("a", *(f"w{number:02}" for number in range(20)))
    (smaller,) = only(pass_time(run, 12, "a"), run_events.Quorum)
    names = ", ".join(f"w{number:02}" for number in range(12))
    assert smaller.reason == f"{names} and 8 more are gone"


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (lambda run: run.left("c"), "c left"),
        (lambda run: run.failed("c", 1), "c failed"),
    ],
)
def test_a_quorum_of_all_that_shrinks_is_reported(event, reason):
    run = heard("a", "b", "c")
    expected = run_events.Quorum(round=1, needed=2, was=3, reason=reason)
    assert only(event(run), run_events.Quorum) == [expected]


def test_a_numeric_quorum_does_not_shrink():
    run = heard("a", "b", "c", rules=Rules(rounds=1, quorum=Quorum(number=3)))
    assert "quorum" not in event_names(run.left("c"))
    assert run.state.needed == 3


def test_no_round_commits_with_fewer_updates_than_least():
    run = heard("a", "b", "c", rules=Rules(rounds=1, min_workers=3, least=3))
    run.update("a")
    assert not only([*run.left("b"), *run.left("c")], fx.Commit)
    assert run.state.needed == 3
    run.seen("b", session="b-2", hello=True)
    run.seen("c", session="c-2", hello=True)
    assert only([*run.update("b"), *run.update("c")], fx.Commit)


def test_heartbeats_from_before_the_link_do_not_count():
    run = Run(Rules(rounds=1, min_workers=3), hearing=True)
    run.link = 1
    run.on(ev.Connected(run.now, 1))
    effects = [e for name in "abc" for e in run.seen(name)]  # these waited in the broker
    assert effects == [fx.Welcome(name) for name in "abc"]  # a worker that is alive answers
    assert not run.state.workers
    assert not [e for name in "abc" for e in run.seen(name)]  # once is enough
    run.echo()
    assert run.seen("c")
    assert set(run.state.workers) == {"c"}
    assert run.state.phase is Phase.WAITING


@pytest.mark.parametrize("announced", [Table(), Table({"a": 10, "b": 10})], ids=["new", "resumed"])
def test_the_clock_stops_before_workers_with_short_heartbeats_would_be_gone(announced):
    run = Run(Rules(rounds=1), hearing=True, announced=announced)
    run.connect()
    for name in "ab":
        run.seen(name, hello=True, heartbeat_s=0.2)  # five of them take a second
    run.now += 9
    effects = [*run.tick(), *run.seen("a", heartbeat_s=0.2), *run.tick(), *run.echo(), *run.tick()]
    assert "gone" not in event_names(effects)


# --- weights -----------------------------------------------------------------------------------


def arrives(run: Run, name: str, num_examples: int) -> fx.Effects:
    run.deliveries += 1
    number, base = run.state.round, run.state.base
    sent = update(run.last_handle, name, number, base, num_examples)
    return run.on(replace(sent, now=run.now))


def fold(run: Run, name: str, num_examples: int) -> fx.Fold:
    return fx.Fold(update(run.last_handle, name, num_examples=num_examples))


def test_an_update_weighs_no_more_than_its_worker_announced():
    run = heard("a", "b")
    announced = run.state.announced.insert("b", 20)
    run.state = run.state.replace(announced=announced)  # which says nothing about a
    effects = arrives(run, "a", 10**12)
    assert only(effects, fx.Fold) == [fold(run, "a", 10)]
    expected = run_events.Overweight(worker="a", round=1, num_examples=10**12, limit=10)
    assert only(effects, run_events.RunEvent) == [expected]
    assert run.state.received[Ticket("a", 1)].num_examples == 10


def test_a_forged_hello_does_not_make_an_update_weigh_less():
    run = heard("a", "b")
    impostor = rs.Worker("a", "another", 1, (), 2.0, run.now)
    run.on(ev.Seen(run.now, impostor, hello=True))
    assert only(arrives(run, "a", 10), fx.Fold) == [fold(run, "a", 10)]


def test_an_update_weighs_no_more_than_the_operator_allows():
    run = heard("a", "b", rules=Rules(rounds=1, max_examples=7))
    assert only(arrives(run, "a", 9), fx.Fold) == [fold(run, "a", 7)]
    assert only(arrives(run, "b", 5), fx.Fold) == [fold(run, "b", 5)]


def test_an_unheard_worker_weighs_no_more_than_any_other():
    run = heard("a", "b")
    assert only(arrives(run, "stranger", 10**9), fx.Fold)[0].update.num_examples == 10


def test_a_copy_weighs_by_its_own_number_of_examples():
    run = heard("a", "b")
    arrives(run, "a", 3)
    arrives(run, "a", 10**6)
    assert only(run.fold_failed("a"), fx.Fold) == [fold(run, "a", 10)]


# --- stalled and long work ---------------------------------------------------------------------


def training(run: Run, name: str, step: int) -> fx.Effects:
    return run.seen(name, state="training", run=RUN, round=1, base="b0", step=step, steps=100)


def train_for(run: Run, seconds: float, moving: str, still: str = "") -> fx.Effects:
    effects: fx.Effects = []
    for _ in range(0, int(seconds), 2):
        run.now += 2
        effects += run.echo()
        for name in moving:
            effects += training(run, name, int(run.now) % 10**6)
        for name in still:
            effects += training(run, name, 3)
        effects += run.tick()
        if run.state.outcome:
            break
    return effects


def test_a_stalled_training_is_reported_once():
    run = heard("a", "b", rules=Rules(rounds=1, stall_s=120))
    run.update("a")
    effects = train_for(run, 300, "", "b")
    expected = run_events.Stalled(
        worker="b", round=1, state="training", step=3, steps=100, still_s=120.0
    )
    assert only(effects, run_events.Stalled) == [expected]
    assert run.state.phase is Phase.OPEN


def test_a_stalled_training_fails_with_the_option():
    run = heard("a", "b", rules=Rules(rounds=1, stall_timeout_s=60))
    run.update("a")
    effects = train_for(run, 62, "", "b")
    assert {"failure", "quorum"} <= set(event_names(effects))
    assert only(effects, fx.Commit)


def work_for(run: Run, seconds: float, name: str, state: str) -> fx.Effects:
    """Let a worker report for a while that it is at work, without a step."""
    number = run.state.round - (state == "evaluating" and run.state.phase is Phase.EVALUATING)
    work = {"state": state, "run": RUN, "round": number, "base": run.state.base}
    effects = []
    for _ in range(0, int(seconds), 2):
        run.now += 2
        effects += [*run.echo(), *run.seen(name, **work), *run.tick()]
    return effects


@pytest.mark.parametrize(
    ("state", "about"),
    [("training", "training, no step reported"), ("evaluating", "evaluating")],
)
def test_work_that_has_not_reported_a_step_is_reported_once_after_ten_minutes(state, about):
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=10**4))
    run.update("a")
    assert not only(work_for(run, 598, "b", state), run_events.Stalled)
    (stalled,) = only(work_for(run, 600, "b", state), run_events.Stalled)
    assert f"b sends heartbeats, but has reported no progress for 600 s ({about}); to count" in (
        stalled.sentence()
    )


@pytest.mark.parametrize("state", ["training", "evaluating"])
def test_work_that_has_not_reported_a_step_fails_with_the_option(state):
    run = heard("a", "b", rules=Rules(rounds=1, stall_timeout_s=60))
    run.update("a")
    effects = work_for(run, 62, "b", state)
    (failure,) = only(effects, run_events.Failure)
    assert failure.reason == f"no progress for 60 s, {state} (--stall-timeout)"
    assert failure.sentence() == f"round 1: b failed: {failure.reason}"  # its task did not
    assert only(effects, fx.Commit)


@pytest.mark.parametrize("state", ["receiving", "sending"])
def test_a_message_that_is_not_in_parts_does_not_stall(state):
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=10**4, stall_timeout_s=60))
    run.update("a")
    assert not {"stalled", "failure"} & set(event_names(work_for(run, 1000, "b", state)))


def test_a_run_that_ends_because_of_a_stall_does_not_say_that_the_worker_reported_it():
    run = heard("a", rules=Rules(rounds=1, min_workers=1, stall_timeout_s=60))
    train_for(run, 62, "", "a")
    assert run.state.reason.startswith("every worker failed in round 1; a: no progress for 60 s")


def test_a_long_round_is_not_a_dead_one():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60, max_reopenings=3))
    run.update("a")
    effects = train_for(run, 60 * 10, "b")
    assert event_names(effects).count("reopened") >= 9
    assert not asked(effects)  # b is at work
    assert run.state.phase is Phase.OPEN
    assert only(run.update("b"), fx.Commit)


def test_a_long_round_ends_at_the_operators_limit_which_is_named():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60, max_round_s=200))
    run.update("a")
    train_for(run, 400, "b")
    assert run.state.outcome == "stopped"
    assert "--max-round" in run.state.reason
    assert "missing: b" in run.state.reason


def test_a_round_is_not_reopened_at_a_deadline_that_is_also_its_limit():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60, max_round_s=120))
    effects = pass_time(run, 130, heard="ab")
    assert event_names(effects).count("reopened") == 1
    assert run.state.reason.endswith("--max-round")


def test_a_round_that_was_reopened_is_closed_at_its_limit_with_enough_updates():
    limits = {"deadline_s": 60, "max_round_s": 90}
    rules = Rules(rounds=1, min_workers=3, on_deadline="close", min_updates=2, **limits)
    run = heard("a", "b", "c", rules=rules)
    run.update("a")
    assert "reopened" in event_names(pass_time(run, 65, heard="abc"))
    run.update("b")
    assert run.state.phase is Phase.OPEN
    assert event_names(pass_time(run, 30, heard="abc")).count("closed") == 1
    assert run.state.phase is Phase.COMMITTING


def test_after_our_own_outage_a_model_in_parts_is_sent_again():
    run = heard("a", "b")

    def receiving() -> fx.Effects:
        work = {"state": "receiving", "run": RUN, "round": 1, "base": "b0", "step": 1, "steps": 10}
        return run.seen("b", **work)

    receiving()
    run.disconnect()
    run.now += 5
    run.connect()
    assert asked(receiving()) == ["b"]
    assert not asked(receiving())  # only once: it is on its way


def test_our_own_outage_does_not_count_as_a_stall():
    run = heard("a", "b", rules=Rules(rounds=1, stall_s=120))
    train_for(run, 30, "a", "b")
    assert run.state.advancing("a")
    run.disconnect()
    run.now += 300
    run.connect()
    assert run.state.advancing("a")
    assert "stalled" not in event_names(train_for(run, 60, "a", "b"))


def test_after_our_own_outage_every_worker_has_the_full_time_to_be_heard():
    run = heard("a", "b")
    pass_time(run, 8, "a")  # b was nearly gone
    run.disconnect()
    run.now += 60
    run.connect()
    assert "gone" not in event_names(pass_time(run, 8, "a"))
    assert "gone" in event_names(pass_time(run, 4, "a"))


# --- samples -----------------------------------------------------------------------------------


def test_a_reopened_round_prefers_other_workers():
    names = "abcdefgh"
    rules = Rules(rounds=1, min_workers=8, fraction=0.5, deadline_s=60)
    run = heard(*names, rules=rules)
    first = set(run.state.asked)
    assert len(first) == 4
    answered, busy, *hung = sorted(first)
    run.update(answered)
    effects = pass_time(run, 58, names.replace(busy, ""))
    run.now += 1
    training(run, busy, 7)
    effects = pass_time(run, 2, "")
    assert "reopened" in event_names(effects)
    # Workers that answered or are at work stay; idle workers take the places of silent ones.
    again = set(run.state.asked)
    assert {answered, busy} <= again
    assert len(again) == 4
    assert not again & set(hung)


def test_a_sample_below_the_quorum_waits_for_more_workers():
    rules = Rules(rounds=1, min_workers=3, quorum=Quorum(number=3), fraction=0.5)
    run = Run(rules, hearing=True)
    run.connect()
    for name in "abcd":
        run.seen(name, hello=True)
    assert run.state.phase is Phase.WAITING  # half of four cannot reach the quorum
    run.seen("e", hello=True)
    assert run.state.phase is Phase.OPEN
    assert len(run.state.asked) == 3


# --- rejected updates --------------------------------------------------------------------------


def test_a_round_asked_again_after_a_rejection_is_another_attempt():
    run = heard("a", "b", rules=Rules(rounds=1, quorum=Quorum(number=2), deadline_s=60))
    run.update("a")
    run.arrived("b")
    run.fold_failed("b")
    effects = pass_time(run, 62, "ab")
    assert fx.SendFit(("b",), evaluate=False, sequence=1, attempt=1) in effects
    run.arrived("b")
    run.fold_failed("b")
    assert fx.SendFit(("b",), evaluate=False, sequence=1, attempt=2) in pass_time(run, 62, "ab")


# --- the vote on classes and model -------------------------------------------------------------


def gathered(*workers: tuple[str, dict[str, object]], **rules: object) -> tuple[Run, list]:
    run = Run(Rules(rounds=1, min_workers=len(workers), **rules), hearing=True, has_weights=False)
    effects = run.connect()
    for name, fields in workers:
        effects += run.seen(name, hello=True, **fields)
    return run, effects


def test_the_majority_decides_on_the_classes():
    odd, even = {"classes": ("x", "y")}, {"classes": ("a", "b")}
    run, effects = gathered(("odd", odd), ("p", even), ("q", even))
    assert run.state.classes == ("a", "b")
    (refused,) = only(effects, fx.Refuse)
    assert refused.worker == "odd"
    assert refused.reason.startswith(
        "worker odd has the classes x, y, which the federation lacks, and lacks the classes a, b; "
        "the federation's classes come from p, q; "
    )
    assert "--classes" in refused.reason


def test_the_operator_decides_on_the_classes():
    run = Run(Rules(rounds=1), has_weights=False, classes=("a", "b"), classes_by="--classes")
    run.connect()
    effects = run.seen("w", hello=True, classes=("a", "b", "c"))
    (refused,) = only(effects, fx.Refuse)
    assert "has the class c, which the federation lacks" in refused.reason
    assert "the federation's classes come from --classes;" in refused.reason


def test_the_majority_decides_on_the_form_of_the_model():
    odd, even = {"model": FLOAT64}, {"model": FLOAT32}
    _, effects = gathered(("a", odd), ("b", even), ("c", even))
    assert only(effects, fx.AskInit) == [] or only(effects, fx.AskInit)[0].worker != "a"
    (refused,) = only(effects, fx.Refuse)
    assert refused.worker == "a"
    assert "float64 8" in refused.reason
    assert "float32 8" in refused.reason
    assert "that model comes from b, c;" in refused.reason
    assert refused.reason.endswith("as the other workers")  # a new run would change nothing


def test_a_late_joiner_with_another_model_is_refused_at_once():
    run, _ = gathered(("b", {"model": FLOAT32}), ("c", {"model": FLOAT32}))
    run.on(ev.WeightsReady(run.now, "b0"))
    (refused,) = only(run.seen("a", hello=True, model=FLOAT64), fx.Refuse)
    assert refused.worker == "a"
    assert set(run.state.asked) == {"b", "c"}


def test_a_model_that_the_run_began_with_is_named_with_the_options_that_replace_it():
    run = Run(Rules(rounds=1), model=FLOAT64, classes=("a",), classes_by="--classes")
    run.connect()
    (refused,) = only(run.seen("w", hello=True, model=FLOAT32, classes=("a",)), fx.Refuse)
    assert "; that model comes from this run's first weights; give this worker" in refused.reason
    remedy = "or start a new run with different first weights (--fresh, --init)"
    assert refused.reason.endswith(remedy)


def test_who_was_refused_is_named_as_long_as_the_run_waits():
    run = Run(Rules(rounds=1, wait_s=60), model=FLOAT64)
    run.connect()
    for name in "ba":
        run.seen(name, hello=True, model=FLOAT32)
    waiting = waiting_for(run.state, run.now)
    assert waiting is not None
    assert waiting.reason.endswith("0 of 2 are connected (nobody); refused: a, b")
    run.seen("b", hello=True, model=FLOAT64, session="another")
    run.tick(60)
    assert run.state.reason == "0 of 2 workers joined in 60 s (--wait-workers); refused: a"
    assert run.state.unheard == ("b",)


def test_a_refusal_is_sent_once_per_session_and_for_every_hello():
    run = Run(Rules(rounds=1), has_weights=False, classes=("a",))
    run.connect()
    assert only(run.seen("w", hello=True, classes=("b",)), fx.Refuse)
    assert not run.seen("w", classes=("b",))
    assert only(run.seen("w", hello=True, classes=("b",)), fx.Refuse)
    assert only(run.seen("w", session="w-2", classes=("b",)), fx.Refuse)


# --- many workers ------------------------------------------------------------------------------


def test_the_work_of_a_round_is_linear_in_its_workers():
    # Measured by data structures, not by seconds: no mapping is copied for a single worker.
    run = heard(*(f"w{number}" for number in range(200)), rules=Rules(rounds=1, min_workers=200))
    tables = [name for name, value in vars(run.state).items() if isinstance(value, rs.Table)]
    assert {"workers", "asked", "received", "evaluations", "announced"} <= set(tables)
    grows = (dict, set, frozenset, list)
    copied = {name for name, value in vars(run.state).items() if isinstance(value, grows)}
    # These change once per round, link or deadline.
    assert copied <= {"counted_before", "earlier", "asked_before", "unevaluated"}


def test_the_tally_equals_a_new_count():
    run = heard("a", "b", "c", "d")
    run.update("a")
    run.left("b")
    run.failed("c", 1)
    run.evaluation("d", 0)
    assert run.state.replace_and_recount().tally == run.state.tally
    assert run.state.tally == rs.Tally(expected=2, unfolded=1, unevaluated=1)


def test_there_is_no_wakeup_after_the_clock_has_stopped():
    run = heard("a", "b", rules=Rules(rounds=1, deadline_s=60))
    assert rounds.wakeup(replace(run.state, heard_at=run.now - 10)) == math.inf


# --- work that is sent again -------------------------------------------------------------------


def fits(effects: fx.Effects) -> list[bool]:
    """Return whether each message with work is a repetition."""
    return [fit.repeat for fit in only(effects, fx.SendFit)]


def test_work_is_repeated_less_and_less_often_while_its_worker_stays_idle():
    run = heard("a", "b", rules=Rules(rounds=2, deadline_s=600))
    opened_at, repeated = run.now, []
    while run.now < opened_at + 220:
        effects = pass_time(run, 2.0, "a")
        assert all(fits(effects))
        repeated += [run.now - opened_at] * len(fits(effects))
    assert repeated == [16.0, 46.0, 106.0]  # 15 s, 30 s, 60 s and 120 s, noticed every 2 s
    assert fits(run.seen("a", hello=True)) == [False]  # its connection lost what was on its way


@pytest.mark.parametrize(
    "arriving", [{}, {"state": "receiving", "run": RUN, "round": 1, "steps": 9}]
)
def test_no_work_is_repeated_while_bytes_of_a_message_arrive(arriving):
    run = heard("a", "b", rules=Rules(rounds=2, deadline_s=600))
    for step in range(1, 100):
        run.now += 2.0
        run.echo()
        run.seen("b", state="training", run=RUN, round=1)
        # Over a slow line, it cannot know what it is until all of it has arrived.
        assert not fits(run.seen("a", **arriving, incomplete_bytes=40_000 * step))
    for _ in range(10):
        run.now += 2.0
        run.echo()
        stuck = run.seen("a", **arriving, incomplete_bytes=40_000 * step)
        if fits(stuck):
            break
    assert fits(stuck) == [True]


def test_a_round_stays_open_while_a_model_arrives_however_slowly():
    run = heard("a", "b", rules=Rules(rounds=2, deadline_s=60, max_round_s=3600))
    run.update("b")
    effects = []
    for step in range(1, 500):
        run.now += 2.0
        effects += run.echo()
        effects += run.seen("b")
        effects += run.seen("a", incomplete_bytes=40_000 * step)
    assert len(only(effects, run_events.Reopened)) > 10
    assert not fits(effects)
    assert not only(effects, fx.End)


def test_no_work_is_repeated_behind_an_earlier_one():
    run = heard("a", "b", rules=Rules(rounds=3, quorum=Quorum(number=1), deadline_s=600))
    run.update("b")
    run.committed("b")
    for step in range(1, 100):
        run.now += 2.0
        run.echo()
        trains = {"state": "training", "run": RUN, "round": 1, "step": 1}
        assert not fits(run.seen("a", **trains, incomplete_bytes=40_000 * step))
    stalled = run.state.workers["a"]
    assert (stalled.moved_at, stalled.received_at) == (run.now - 196.0, run.now)


def test_the_reason_of_a_failure_after_a_stall_is_reported():
    run = heard("a", "b", rules=Rules(rounds=1, stall_timeout_s=60))
    run.update("a")
    train_for(run, 62, "", "b")
    reasons = [
        one.reason
        for _ in range(3)
        for one in only(
            run.on(ev.Failed(run.now, "b", RUN, 1, "out of memory")), run_events.Failure
        )
    ]
    assert reasons == ["out of memory"]


def test_who_announces_parts_that_never_come_is_not_sent_the_model_every_time():
    run = heard("a", "b")
    requests = []
    for _ in range(100):
        run.now += 0.1
        run.arrived("a")
        requests += fits(run.fold_failed("a", again=True))
    assert requests == [True]
    for _ in range(20):
        pass_time(run, 2, "b")
        run.at_work("a")
    run.arrived("a")
    assert fits(run.fold_failed("a", again=True)) == [True]


def test_no_worker_can_fill_the_log_with_failures():
    run = heard("a", "b", rules=Rules(rounds=3, quorum=Quorum(number=1)))
    run.update("b")
    run.committed("b")
    effects = []
    for number in (0, 2, 1, 3, 1, 2, 9):
        effects += run.on(ev.Failed(run.now, "a", RUN, number, "boom"))
        effects += run.on(ev.Failed(run.now, "z", RUN, number, "boom"))
        effects += run.seen("a")
    reported = only(effects, run_events.Failure)
    assert [(one.worker, one.round) for one in reported] == [("a", 2), ("a", 1), ("a", 2)]
    assert set(run.state.failed) == {"a"}


def test_max_examples_bounds_the_weight_of_an_evaluation():
    run = opened_for_evaluation(Rules(rounds=1, max_examples=50))
    run.on(
        ev.EvaluationArrived(run.now, RUN, 1, "a", rs.Evaluated(10**12, 0.0, {}), run.state.base)
    )
    effects = run.on(
        ev.EvaluationArrived(run.now, RUN, 1, "b", rs.Evaluated(20, 0.5, {}), run.state.base)
    )
    (recorded,) = only(effects, fx.RecordEvaluation)
    assert [recorded.evaluations[name].num_examples for name in "ab"] == [50, 20]


def opened_for_evaluation(rules: Rules) -> Run:
    run = heard("a", "b", rules=rules)
    run.update("a")
    run.update("b")
    run.committed("a", "b")
    assert run.state.phase is Phase.EVALUATING
    return run
