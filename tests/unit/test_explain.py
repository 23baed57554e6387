"""Explanations of a round from its events."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages import Event
from fluffle_coordinator.cli.journal import _choose_round, _spans
from fluffle_coordinator.observe.explain import (
    Entry,
    Explanation,
    Wait,
    explain,
    longest_wait,
    runs_of,
)
from fluffle_coordinator.observe.explain_sentences import as_dict, sentences

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def clock(time: datetime) -> str:
    return time.astimezone().strftime("%H:%M:%S")


class Story:
    """The events of a run, each at a given second."""

    def __init__(self, run: str = "r") -> None:
        self.run, self.events = run, list[Entry]()

    def add(self, seconds: float, event: str, run: str | None = None, **fields: Any) -> Story:
        message = Event(
            federation="f",
            event=event,
            time=at(seconds).isoformat(timespec="milliseconds"),
            session="s",
            number=len(self.events) + 1,
            run=run or self.run,
            fields=fields,
        )
        self.events.append(Entry.of(message))
        return self

    def opened(
        self, seconds: float = 10, number: int = 7, event: str = "opened", **more: Any
    ) -> Story:
        fields = {"round": number, "asked": ["a", "b", "c"], "needed": 3, "deadline_s": 600.0}
        return self.add(seconds, event, **{**fields, **more})

    def counted(self, seconds: float, worker: str, updates: int, **more: Any) -> Story:
        fields = {"round": 7, "worker": worker, "num_examples": 80, "updates": updates, "needed": 3}
        return self.add(seconds, "counted", **{**fields, "train_s": 1.5, **more})

    def explained(
        self, now: float, number: int = 7, coordinated: bool | None = None
    ) -> tuple[Explanation, str]:
        explanation = explain(self.events, self.run, number, at(now), coordinated=coordinated)
        return explanation, "\n".join(sentences(explanation))


def begun() -> Story:
    story = Story().add(0, "started", folder="runs/f").add(1, "connected")
    for worker in ("a", "b", "c"):
        story.add(2, "joined", worker=worker, num_examples=80)
    return story.opened()


def test_a_stuck_round_names_the_missing_workers_and_the_time_left():
    story = (
        begun().counted(13, "a", 1).counted(15, "b", 2).add(40, "gone", worker="c", silent_s=5.0)
    )
    explanation, text = story.explained(now=100)
    assert explanation.round.is_open
    assert explanation.missing == ["c"]
    assert explanation.left_s == pytest.approx(510)
    assert "is open" in text
    assert "for a, b, c; 3 updates needed" in text
    assert "a answered at" in text
    assert "3.0 s after the opening: 80 examples, 1.5 s of training" in text
    gone = f"it has been gone since {clock(at(40))} (no heartbeat for 5 s)"
    assert f"Still waiting for c: {gone}." in text
    assert f"8 min 30 s left until the deadline, at {clock(at(610))}" in text
    assert "Round 7 has 2 of 3 updates; 1 more needed" in text
    assert "The longest wait is for c: 1 min 25 s so far, since b answered." in text


@pytest.mark.parametrize(
    ("event", "fields", "words"),
    [
        ("left", {"worker": "c", "reason": "told to stop"}, "(told to stop)"),
        (
            "failure",
            {"worker": "c", "round": 7, "reason": "out of memory"},
            "it failed (out of memory)",
        ),
        (
            "joined",
            {"worker": "c", "num_examples": 80},
            "connected, no update yet",
        ),
    ],
)
def test_what_is_known_of_a_missing_worker(event, fields, words):
    _, text = begun().add(20, event, **fields).explained(now=30)
    (line,) = [line for line in text.splitlines() if line.startswith("Still waiting for c")]
    assert words in line


def rejected_b() -> Story:
    return begun().add(12, "rejected", reason="it has a NaN", kind="update", worker="b", round=7)


@pytest.mark.parametrize(("state", "more"), [("failed", ""), ("training", "; training 3/40 at ")])
def test_a_worker_whose_update_was_rejected_may_train_again(state, more):
    doing = {"worker": "b", "state": state, "step": 3, "steps": 40}
    story = rejected_b().add(20, "waiting", what="updates", round=7, missing=[doing], short=0)
    more = more and more + clock(at(20))
    said = f"b: its update was rejected at {clock(at(12))} (it has a NaN){more}."
    assert said in story.explained(now=30)[1]


def test_a_later_event_says_more_of_a_worker_than_its_rejected_update():
    assert "b answered at" in rejected_b().counted(20, "b", 1).explained(now=30)[1]
    story = rejected_b().add(20, "joined", worker="b", num_examples=80)
    assert "Still waiting for b: connected, no update yet" in story.explained(now=30)[1]
    _, text = rejected_b().add(20, "gone", worker="b", silent_s=5.0).explained(now=30)
    assert "Still waiting for b: it has been gone since" in text
    assert "rejected a message of b: it has a NaN." in text


def test_a_rejected_update_is_named_after_the_commit_too():
    story = rejected_b().counted(13, "a", 1).counted(14, "c", 2)
    story.add(15, "committed", round=7, participants=["a", "c"], num_examples=160)
    said = f"No update of b was counted: its update was rejected at {clock(at(12))} (it has a NaN)."
    assert said in story.explained(now=30)[1]


def test_what_an_operator_should_look_at_is_explained():
    story = begun()
    story.add(11, "overweight", worker="a", round=7, num_examples=10**9, limit=80)
    story.add(12, "stalled", worker="b", round=7, state="training", step=3, steps=40, still_s=120.0)
    story.add(13, "outlier", worker="a", round=7, norm=40.0, median=1.0)
    story.add(14, "quorum", round=7, needed=2, was=3, reason="c is gone")
    story.add(15, "frozen_differs", worker="b", other="a")
    _, text = story.explained(now=200)
    assert (
        f"At {clock(at(11))}: the update of a claims 1,000,000,000 examples, but counts as 80"
        in text
    )
    assert "b sends heartbeats, but has reported no progress for 120 s (training, step 3" in text
    assert "the norm of the update of a is 40, but the median is 1" in text
    assert "now needs 2 updates instead of 3 (c is gone)." in text
    assert "the frozen tensors of b and a differ" in text


def test_a_worker_that_came_back_is_no_longer_gone():
    story = begun().add(20, "gone", worker="c", silent_s=5.0)
    story.add(30, "joined", worker="c", num_examples=80)
    explanation, text = story.explained(now=40)
    assert "Still waiting for c: connected, no update yet." in text
    assert explanation.view.workers.present == {"a", "b", "c"}


def test_a_round_of_many_workers_is_explained_on_a_screen():
    names = [f"w{number:03}" for number in range(1000)]
    story = Story().opened(asked=names, needed=1000)
    for place, name in enumerate(names[:600]):
        story.counted(11 + place / 100, name, place + 1, needed=1000)
    explanation, text = story.explained(20)
    assert len(text.splitlines()) < 60
    assert "and 988 more; 1,000 updates needed" in text
    assert "575 earlier answers: see 'fluffle journal --round 7'" in text
    assert "w599 answered" in text
    assert "375 more workers without an update" in text
    data = as_dict(explanation)
    assert (len(data["answers"]), len(data["missing"]), len(data["asked"])) == (600, 400, 1000)


def test_a_worker_that_joined_late_is_waited_for_too():
    explanation, text = begun().add(20, "joined", worker="d", num_examples=5).explained(now=30)
    assert explanation.missing == ["a", "b", "c", "d"]
    assert f"Still waiting for d: connected, joined at {clock(at(20))}" in text


def test_metrics_are_told_apart_by_who_measured_them():
    story = begun().counted(13, "a", 1)
    story.add(34, "committed", round=7, participants=["a"], num_examples=80, timings={})
    story.add(35, "personal", round=7, metrics={"personal_loss": 0.25})
    story.add(36, "tested", round=7, metrics={"accuracy": 0.5})
    _, text = story.explained(now=100)
    assert "Before averaging, the workers' own models reached personal_loss 0.2500." in text
    assert "The coordinator's own test of the model gave test/accuracy 0.5000." in text
    assert "was evaluated" not in text
    story.add(40, "evaluated", round=7, loss=0.5, num_examples=60, metrics={"auc": 0.9})
    _, text = story.explained(now=100)
    assert "was evaluated: loss 0.5000, auc 0.9000 on 60 held-out examples." in text


def test_a_committed_round_names_participants_longest_wait_and_metrics():
    story = begun().counted(13, "a", 1).counted(33, "c", 2, train_s=19.0)
    timings = {"fold_s": 0.002, "average_s": 0.001, "checkpoint_s": 0.03, "open_s": 23.97}
    story.add(34, "committed", round=7, participants=["a", "c"], num_examples=160, timings=timings)
    story.add(35, "late", worker="b", round=7, num_examples=80)
    metrics = {"accuracy": 0.9}
    story.opened(35, 8)
    story.add(40, "evaluated", round=7, loss=0.5, num_examples=60, metrics=metrics)
    explanation, text = story.explained(now=1000)
    assert not explanation.round.is_open
    assert explanation.left_s is None
    committed = f"Round 7 was committed at {clock(at(34))}, 24 s after the opening"
    assert f"{committed}, with a, c, 160 examples." in text
    assert "adding up 2 ms, averaging 1 ms, checkpoint 30 ms" in text
    assert "loss 0.5000, accuracy 0.9000 on 60 held-out examples" in text
    assert "update of b arrived late and was discarded." in text
    assert "no update of b" not in text
    assert (
        "The longest wait was for c: it trained for 19 s and answered 23 s after the opening, "
        "20 s after a." in text
    )
    assert "deadline" not in text


def test_rejections_and_refusals_are_explained():
    story = begun()
    story.add(
        12,
        "rejected",
        reason="tensor 'w': NaN or infinite",
        cause="not_finite",
        worker="b",
        round=7,
    )
    story.add(
        13,
        "rejected",
        reason="the body is not a msgpack array of [header, payload]",
        cause="malformed",
    )
    story.add(14, "rejected", reason="it is of round 9", cause="round", round=9, worker="c")
    story.add(15, "refused", worker="x", reason="other classes")
    story.add(16, "resend", worker="a", reason="its parts are gone")
    explanation, text = story.explained(now=20)
    why = f"its update was rejected at {clock(at(12))} (tensor 'w': NaN or infinite)"
    assert f"Still waiting for b: {why}." in text
    assert text.count("NaN") == 1
    assert {"worker": "b", "why": why} in as_dict(explanation)["missing"]
    assert "Still waiting for c: connected, no update yet." in text
    assert "rejected a message: the body is not a msgpack array of [header, payload]." in text
    assert "refused: other classes (x)." in text
    assert "asking a to send its update again: its parts are gone." in text


def test_a_worker_that_repeats_itself_hides_nothing_else():
    story = begun().counted(11, "b", 1)
    for second in range(2000):
        story.add(12 + second / 10, "duplicate", worker="b", round=7)
        story.add(12 + second / 10, "rejected", reason="it is no message", cause="malformed")
    story.opened(612, event="reopened", asked=["a"], needed=2, reason="round 7 has 1 of 3")
    explanation, text = story.explained(now=620)
    last = f"At {clock(at(211))}"
    assert text.count("update of b arrived again") == 5
    assert f"{last}: update of b arrived again; it is already counted (1,995 similar" in text
    assert f"{last}: rejected a message: it is no message (1,995 similar" in text
    assert "round 7 has 1 of 3; reopened for a." in text
    assert [note["unlisted"] for note in as_dict(explanation)["notes"]][-3:] == [1995, 1995, 0]


def test_a_reopened_round_has_a_new_deadline_and_keeps_its_answers():
    story = begun().counted(13, "a", 1)
    story.opened(610, event="reopened", asked=["a", "b"], needed=2, reason="round 7 has 1 of 3")
    explanation, text = story.explained(now=620)
    assert explanation.left_s == pytest.approx(590)
    assert explanation.missing == ["b"]
    assert list(explanation.round.answers) == ["a"]
    assert "round 7 has 1 of 3; reopened for a, b." in text


def test_an_outage_postpones_the_deadline():
    story = begun().add(100, "disconnected", reason="reset")
    explanation, text = story.explained(now=300)
    assert explanation.left_s == pytest.approx(510)  # as when the broker was lost
    assert "lost the connection to the broker" in text
    explanation, _ = story.add(160, "reconnected").explained(now=300)
    assert explanation.left_s == pytest.approx(370)


def test_a_deadline_that_passed_in_silence_suggests_a_missing_coordinator():
    _, text = begun().explained(now=700)
    assert "The deadline passed" in text
    assert "the coordinator is not running, is suspended, or cannot reach the broker" in text


def test_a_connected_coordinator_is_not_said_to_be_missing_after_the_deadline():
    _, text = begun().explained(now=700, coordinated=True)
    assert "The deadline passed" in text
    assert "not running" not in text


def test_a_round_that_stays_open_after_its_deadline():
    doing = {"worker": "b", "state": "training", "step": 3, "steps": 40}
    story = begun().add(690, "waiting", what="updates", round=7, missing=[doing], short=0)
    _, text = story.explained(now=700)
    assert "the round stays open while workers advance" in text
    assert "not running" not in text


def test_a_full_disk_is_named_until_the_update_that_waited_for_it_is_counted():
    story = begun().counted(13, "a", 1)
    story.add(20, "disk", folder="runs/f", reason="No space left on device", pause_s=5.0)
    story.add(690, "waiting", what="updates", round=7, missing=[], short=0)
    _, text = story.explained(now=700)
    assert f"At {clock(at(20))}: cannot write to runs/f (No space left on device)" in text
    assert "Still waiting for b: its update has arrived and is being added." in text
    assert "passed" not in text
    _, text = story.counted(701, "b", 2).explained(now=702)
    assert "cannot write" not in text


def test_a_round_that_was_open_when_the_coordinator_was_lost():
    story = begun().counted(13, "a", 1).add(50, "resumed", round=6).add(51, "connected")
    explanation, text = story.explained(now=55)
    assert explanation.left_s is None
    assert "A coordinator was started at" in text
    story.add(56, "joined", worker="a", num_examples=80).opened(57, asked=["a"], needed=1)
    explanation, text = story.explained(now=60)
    assert explanation.missing == ["a"]  # its update is delivered again
    assert explanation.left_s == pytest.approx(597)
    assert "the round was opened again" in text
    explanation, _ = story.counted(61, "a", 1, needed=1).explained(now=62)
    assert explanation.missing == []


def test_updates_that_count_before_the_round_is_opened_again():
    story = begun().counted(13, "a", 1).add(20, "interrupted").add(50, "resumed", round=6)
    for updates, worker in enumerate("abc", start=1):
        story.counted(50.0 + updates, worker, updates)
    explanation, text = story.opened(55).explained(now=56)
    assert explanation.missing == []
    assert f"a answered at {clock(at(51))}, before the round was opened again: 80" in text
    assert "No update" not in text
    story.add(57, "committed", round=7, participants=["a", "b", "c"], num_examples=240)
    _, text = story.explained(now=60)
    assert "no update of" not in text
    assert "with a, b, c, 240 examples." in text


def test_a_restarted_coordinator_has_not_opened_the_round_again():
    story = begun().add(20, "interrupted").add(50, "resumed", round=6)
    story.add(51, "joined", worker="b", num_examples=80)
    reason = "waiting for workers: 1 of 5 are connected (b)"
    story.add(52, "waiting", reason=reason, what="workers")
    explanation, text = story.explained(now=60)
    assert text.startswith("Round 7 of run")
    assert "is not open now: opened on" in text
    assert "needed" not in text
    silent = f"not heard from since the coordinator's restart at {clock(at(50))}"
    assert f"Still waiting for a: {silent}." in text
    assert "Still waiting for b: connected, no update yet." in text
    assert "opens the round again as soon as enough workers are connected." in text
    assert f'At {clock(at(52))} the coordinator reported "{reason}".' in text
    assert as_dict(explanation)["open"] is False
    explanation, text = story.opened(70).explained(now=80)
    assert "is open: opened on" in text
    assert "3 updates needed" in text
    assert as_dict(explanation)["open"] is True


def test_the_journal_may_be_ahead_of_this_machines_clock():
    explanation, text = begun().counted(13, "a", 1).explained(now=11)
    assert explanation.now == at(13).timestamp()
    assert "a answered at" in text
    assert "since the opening" not in text


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ("finished", "The run has finished: enough."),
        ("stopped", "The run has stopped: enough."),
        (
            "interrupted",
            f"The coordinator was told to stop at {clock(at(20))}; the same coordinator "
            "command opens the round again and counts the updates waiting in the queue.",
        ),
    ],
)
def test_a_run_that_ended_with_the_round_open(event, sentence):
    _, text = begun().add(20, event, reason="enough").explained(now=9999)
    assert sentence in text
    assert "was not closed: opened on" in text
    assert "is open" not in text
    assert "deadline" not in text
    assert "Still waiting" not in text
    assert "so far" not in text
    assert "Round 7 has no update of a." in text
    assert "The longest wait was for a, b, c: 10 s since the opening." in text  # until the end


def test_the_last_answer_is_the_longest_wait_even_if_the_first_took_longest():
    story = begun().counted(19, "a", 1).counted(20, "b", 2).counted(21, "c", 3, train_s=10.5)
    story.add(21.5, "committed", round=7, participants=["a", "b", "c"], num_examples=240)
    explanation, text = story.explained(now=30)
    assert longest_wait(explanation) == Wait(11.0, "c", "b")
    assert (
        "The longest wait was for c: it trained for 10.5 s and answered 11 s after the opening, "
        "1.0 s after b." in text
    )


def test_an_asynchronous_round_has_no_negative_wait():
    story = begun().counted(11, "a", 1, staleness=1, weight=56.0).counted(14, "b", 2)
    story.counted(17, "a", 3).add(17.1, "committed", round=7, participants=["a", "b"])
    _, text = story.explained(now=20)
    assert "answered 7.0 s after the opening, 3.0 s after b." in text
    assert "Round 7 has no update of c." in text


def test_a_round_that_took_long_to_close_says_so():
    story = begun().counted(11, "a", 1)
    story.add(41, "committed", round=7, participants=["a"], num_examples=80)
    sentence = "The longest wait was for the commit: it came 30 s after a answered."
    assert sentence in story.explained(now=50)[1]


@pytest.mark.parametrize("set_at", [12, 14, 20, 22])
@pytest.mark.parametrize("jump_s", [10_800, -10_800])
def test_a_clock_that_was_set_lengthens_no_committed_round(set_at, jump_s):
    def shown(seconds: float) -> float:
        return seconds + (jump_s if seconds >= set_at else 0)

    story = begun().counted(shown(13), "a", 1).counted(shown(21), "b", 2)
    timings = {"open_s": 11.0, "average_s": 0.5, "checkpoint_s": 0.5, "fold_s": 1.0}
    story.add(shown(22), "committed", round=7, participants=["a", "b"], timings=timings)
    explanation, text = story.explained(now=shown(30))
    assert 0 < longest_wait(explanation).seconds <= 12
    assert ", 12 s after the opening, with a, b" in text
    assert not re.search(r"\d h\b", text)


def test_a_finished_run_waits_for_nobody():
    story = begun().counted(13, "a", 1).add(14, "committed", round=7, participants=["a"])
    story.add(15, "waiting", reason="waiting for the evaluation by a").add(
        16, "finished", reason="7 rounds are done"
    )
    for worker in ("a", "b", "c"):
        story.add(17, "left", worker=worker, reason="the run has ended")
    _, text = story.explained(now=90)
    assert text.endswith("The run has finished: 7 rounds are done.")
    assert "Still waiting" not in text
    assert "coordinator reported" not in text


def test_a_worker_does_what_the_coordinator_last_reported():
    sentence = "round 7: 1 of 3 updates, 580 s to the deadline; b training 3/40, c receiving"
    training = {"worker": "b", "state": "training", "step": 3, "steps": 40}
    missing = [training, {"worker": "c", "state": "receiving"}, {"worker": 1}]
    story = begun().counted(13, "a", 1)
    story.add(30, "waiting", reason=sentence, what="updates", round=7, missing=missing, short=0)
    _, text = story.explained(now=31)
    assert "the coordinator reported" not in text
    assert f"Still waiting for b: connected, training 3/40 at {clock(at(30))}." in text
    assert f"Still waiting for c: connected, receiving at {clock(at(30))}." in text


def test_it_names_how_many_workers_must_join():
    story = (
        begun()
        .opened(20, 8, asked=["a"])
        .add(20, "waiting", reason="…", what="updates", round=8, missing=[], short=2)
    )
    story.counted(21, "a", 1, round=8).add(22, "joined", worker="b", num_examples=80)
    explanation, text = story.explained(now=31, number=8)
    assert explanation.missing == ["b"]
    assert "Still waiting for b: connected, joined at" in text
    assert "Still waiting for 1 more worker to join." in text
    assert "the coordinator reported" not in text
    story.add(23, "joined", worker="c", num_examples=80)
    assert "to join" not in story.explained(now=31, number=8)[1]


@pytest.mark.parametrize("committed", [False, True])
def test_without_a_coordinator_it_names_the_command(committed):
    story = begun().counted(13, "a", 1)
    if committed:
        story.add(14, "committed", round=7, participants=["a"])
    explanation = explain(story.events, "r", 7, at(50), coordinated=False)
    text = "\n".join(sentences(explanation))
    assert "No coordinator is connected to the broker now. A coordinator that you start" in text
    assert "If it only waits as a standby, the earlier coordinator is suspended" in text
    assert "left until the deadline" not in text


def test_between_two_rounds_it_names_what_the_run_waits_for():
    story = begun().counted(13, "a", 1).add(14, "committed", round=7, participants=["a"])
    story.add(20, "waiting", reason="waiting for workers: 0 of 2 are connected (nobody)")
    assert story.explained(now=25)[1].endswith('0 of 2 are connected (nobody)".')
    assert "0 of 2" not in story.opened(30, number=8).explained(now=35)[1]


def test_before_the_first_round_it_names_connected_and_refused_workers():
    story = Story().add(0, "started", folder="runs/f").add(1, "connected")
    story.add(2, "joined", worker="a", num_examples=80)
    story.add(3, "refused", worker="b", reason="it has other classes")
    story.add(4, "waiting", reason="waiting for workers: 1 of 2 are connected (a)")
    explanation = explain(story.events, *_choose_round(story.events, None, None), at(10))
    text = "\n".join(sentences(explanation))
    assert text.startswith("Run r has opened no round yet.\nConnected workers: a.\n")
    assert f"At {clock(at(3))}: refused: it has other classes (b)." in text
    assert "waiting for workers: 1 of 2" in text
    assert as_dict(explanation)["round"] == 0


def test_other_runs_are_left_out():
    story = begun().add(20, "counted", run="other", round=7, worker="a", num_examples=1)
    story.add(21, "gone", run="other", worker="c", silent_s=1.0)
    explanation, _ = story.explained(now=30)
    assert not explanation.round.answers
    assert explanation.missing == ["a", "b", "c"]


def test_a_round_whose_opening_is_not_in_the_journal():
    story = Story().counted(13, "a", 1)
    explanation, text = story.explained(now=20)
    assert longest_wait(explanation) is None
    assert text == "The opening of round 7 is not in the journal."
    story.add(20, "committed", round=7, participants=["a"])
    assert "its opening is not in the journal" in story.explained(now=30)[1]


def test_the_chosen_round():
    story = begun().opened(20, 8)
    story.events += Story("later").opened(30, 1).opened(40, 2).events
    assert runs_of(story.events) == {"r": [7, 8], "later": [1, 2]}
    assert _choose_round(story.events, None, None) == ("later", 2)
    assert _choose_round(story.events, "r", None) == ("r", 8)
    assert _choose_round(story.events, "r", 7) == ("r", 7)
    with pytest.raises(
        UsageError,
        match="round 9 of run later is not .* has rounds 7-8 of run r, rounds 1-2 of run later",
    ):
        _choose_round(story.events, None, 9)
    with pytest.raises(UsageError, match="run x is not in the journal; choose from r, later"):
        _choose_round(story.events, "x", None)
    with pytest.raises(UsageError, match="no run yet"):
        _choose_round([], None, None)
    with pytest.raises(UsageError, match="has not opened a round yet"):
        _choose_round(Story().add(0, "started").events, None, 1)
    assert _choose_round(Story().add(0, "started").events, None, None) == ("r", 0)
    assert _spans([3, 1, 2, 9]) == "1-3, 9"


def test_as_data():
    explanation, text = (
        begun().counted(13, "a", 1).add(14, "left", worker="b", reason="bye").explained(20)
    )
    data = as_dict(explanation)
    assert data["says"] == text.splitlines()
    assert data["open"] is True
    assert data["left_s"] == pytest.approx(590)
    assert [one["worker"] for one in data["missing"]] == ["b", "c"]
    assert data["answers"] == [
        {
            "worker": "a",
            "at": at(13).isoformat(timespec="milliseconds"),
            "num_examples": 80,
            "train_s": 1.5,
        }
    ]


# --- arbitrary journals -------------------------------------------------------------------------

EVENTS = """started resumed connected reconnected disconnected standby joined left gone refused
failure
init first_weights classes opened reopened closed counted late duplicate resend rejected committed
evaluated waiting disk finished stopped interrupted gap other""".split()
STEPS = ["fold_s", "open_s", "average_s", "checkpoint_s"]
_worker = st.sampled_from(["a", "b", "c"])
_odd = (
    st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.floats()
    | st.lists(st.integers(), max_size=2)
)
_fields = st.fixed_dictionaries(
    {},
    optional={
        "round": st.sampled_from([1, 2]) | _odd,
        "worker": _worker | _odd,
        "asked": st.lists(_worker, max_size=3) | _odd,
        "participants": st.lists(_worker, max_size=3) | _odd,
        "needed": st.integers(-1, 3) | _odd,
        "updates": st.integers(0, 3) | _odd,
        "num_examples": st.integers() | _odd,
        "train_s": st.floats() | _odd,
        "deadline_s": st.floats() | _odd,
        "silent_s": st.floats() | _odd,
        "reason": st.text(max_size=5) | _odd,
        "loss": st.floats() | _odd,
        "metrics": st.dictionaries(st.text(max_size=3), st.floats() | _odd, max_size=2) | _odd,
        "timings": st.dictionaries(st.sampled_from(STEPS), st.floats() | _odd) | _odd,
    },
)
_times = st.floats(-100, 1e6).map(lambda s: at(s).isoformat()) | st.sampled_from(
    ["", "never", "2026-03-01T12:00:00", "0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"]
)
_event = st.builds(
    lambda event, time, run, fields: Entry.of(
        Event(federation="f", event=event, time=time, session="s", number=1, run=run, fields=fields)
    ),
    st.sampled_from(EVENTS),
    _times,
    st.sampled_from(["r", "q", None]),
    _fields,
)


@given(st.lists(_event, max_size=30), st.integers(0, 2), st.floats(-100, 1e6))
def test_any_journal_can_be_explained(events, number, now):
    explanation = explain(events, "r", number, at(now))
    assert all(isinstance(line, str) for line in sentences(explanation))
    data = as_dict(explanation)
    assert {one["worker"] for one in data["missing"]}.isdisjoint(explanation.round.answers)
    for have in runs_of(events).values():
        assert len(have) == len(set(have))
