"""What the page shows, given what happened: the board, without a clock, a broker or a browser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.cli.console import json_line
from fluffle_common.errors import CAUSES
from fluffle_common.protocol.events import from_fields
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.coordinator_source import bring_up_to_date
from fluffle_coordinator.dashboard.snapshot import latest
from fluffle_coordinator.machine.machine import start
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.state import Issued, Phase, Rules, State, Table, Worker
from fluffle_coordinator.observe.run_view import OUTCOMES
from fluffle_coordinator.observe.worker_view import Workers
from tests.history_lines import committed, evaluated, participant

RUN = "0123456789ab"


def board_after(*events: tuple[str, dict[str, Any]], source: str = "coordinator") -> Board:
    """Return a board that was told events, one a second from 100 on."""
    board = Board("letters", source)
    for second, (what, fields) in enumerate(events, start=100):
        board.add(float(second), from_fields(what, fields))
    return board


def opened(number: int, *asked: str, needed: int = 2) -> tuple[str, dict[str, Any]]:
    fields = {"round": number, "asked": list(asked), "needed": needed, "deadline_s": 60.0}
    return "opened", fields


def counted(worker: str, number: int, updates: int, needed: int = 2) -> tuple[str, dict[str, Any]]:
    fields = {"worker": worker, "round": number, "num_examples": 10}
    return "counted", {
        **fields,
        "updates": updates,
        "needed": needed,
        "train_s": 0.5,
        "bytes": 1000,
    }


def rejected(reason: str = "NaN", **more: object) -> tuple[str, dict[str, Any]]:
    return "rejected", {"reason": reason, "cause": "not_finite", **more}


STARTED = ("started", {"run": RUN, "folder": "runs/letters"})
CONNECTED = ("connected", {"address": "amqp://host"})
JOINED = [("joined", {"worker": name, "num_examples": 10}) for name in ("north", "south")]
COMMITTED = (
    "committed",
    {
        "round": 1,
        "participants": ["north", "south"],
        "num_examples": 20,
        "timings": {"waiting_s": 1.0, "open_s": 2.0, "fold_s": 0.25},
    },
)


def worker(name: str, **fields: Any) -> Worker:
    """Return a worker that trains."""
    return Worker(name, "s", 5, (), 2.0, last_seen=8.0, state="training", **fields)


class TestOpenRound:
    def test_it_names_who_answered_and_what_the_others_do(self) -> None:
        board = board_after(STARTED, *JOINED, opened(1, "north", "south"), counted("north", 1, 1))
        training = worker("south", round=1, step=3, steps=9)
        board.view.workers.sign_of_life(105.0, "south", training)
        shown = board.snapshot()["open"]
        assert (shown["round"], shown["updates"], shown["needed"]) == (1, 1, 2)
        assert (shown["opened_at"], shown["deadline_at"]) == (103.0, 163.0)
        assert [(one["worker"], one["after_s"]) for one in shown["answered"]] == [("north", 1.0)]
        south = {"worker": "south", "doing": "training 3/9", "hopeless": False}
        assert shown["missing"] == [south]

    def test_a_worker_that_failed_or_is_gone_is_said_to_be(self) -> None:
        board = board_after(
            STARTED,
            *JOINED,
            opened(1, "north", "south"),
            ("failure", {"worker": "north", "round": 1, "reason": "no memory"}),
            ("gone", {"worker": "south", "silent_s": 12.0}),
        )
        missing = board.snapshot()["open"]["missing"]
        assert all(one["hopeless"] for one in missing)
        doing = {one["worker"]: one["doing"] for one in missing}
        assert doing == {"north": "failed: no memory", "south": "is gone"}

    def test_reopened_keeps_who_has_answered(self) -> None:
        again = ("reopened", {**opened(1, "north", "south")[1], "reason": "too few"})
        board = board_after(
            STARTED, *JOINED, opened(1, "north", "south"), counted("north", 1, 1), again
        )
        shown = board.snapshot()["open"]
        assert [one["worker"] for one in shown["answered"]] == ["north"]
        assert shown["deadline_at"] == 105.0 + 60.0

    def test_a_worker_whose_update_was_rejected_has_failed_unless_it_trains_again(self) -> None:
        fields = {"round": 1, "worker": "north", "kind": "update", "reason": "it has a NaN"}
        board = board_after(STARTED, *JOINED, opened(1, "north"), ("rejected", fields))
        (missing,) = board.snapshot()["open"]["missing"]
        assert (missing["doing"], missing["hopeless"]) == ("failed: it has a NaN", True)
        training = worker("north", round=1, step=3, steps=8)
        board.view.workers.sign_of_life(111.0, "north", training)
        (missing,) = board.snapshot()["open"]["missing"]
        assert (missing["doing"], missing["hopeless"]) == ("training 3/8", False)

    def test_the_journal_does_not_say_when_a_round_with_a_quorum_closes(self) -> None:
        events = [STARTED, *JOINED, opened(1, "north", "south", needed=1)]
        board = board_after(*events, source="journal")
        assert board.snapshot()["open"]["deadline_at"] == 163.0
        board = board_after(*events, counted("north", 1, 1, needed=1), source="journal")
        assert board.snapshot()["open"]["deadline_at"] is None

    def test_committed_closes_it(self) -> None:
        board = board_after(STARTED, *JOINED, opened(1, "north"), counted("north", 1, 1), COMMITTED)
        assert board.snapshot()["open"] is None
        assert board.snapshot()["run"]["words"] == "between two rounds"

    def test_a_quorum_that_shrinks_is_told_at_once(self) -> None:
        shrunk = ("quorum", {"round": 1, "needed": 1, "was": 2, "reason": "south has left"})
        board = board_after(STARTED, *JOINED, opened(1, "north", "south"), shrunk)
        assert board.run()["words"] == "round 1 is open: 0 of 1 updates"

    def test_the_coordinator_knows_better_than_its_events(self) -> None:
        board = board_after(STARTED, CONNECTED, *JOINED, opened(1, "north", "south"))
        here = worker("north", step=3, steps=8)
        state = State(
            Rules(rounds=6, deadline_s=60.0, grace_s=5.0), RUN, 1, QUORUM, phase=Phase.OPEN, link=1,
            workers=Table({"north": here}), asked=Table({"north": Issued(1.0, 1, 1)}),
            opened_at=4.0, began_at=4.0, heard_at=10.0, hearing_s=5.0,
        )  # fmt: skip
        bring_up_to_date(board.view, state, epoch=100.0, now=10.0)
        shown = board.snapshot()
        assert shown["run"]["words"] == "round 1 is open: 0 of 1 updates"
        assert (shown["open"]["needed"], shown["open"]["deadline_at"]) == (1, 164.0)
        assert [one["doing"] for one in shown["open"]["missing"]] == ["training 3/8"]
        assert shown["run"]["rounds"] == 6
        bring_up_to_date(board.view, state.replace(quorum_at=9.0), epoch=100.0, now=10.0)
        assert board.snapshot()["open"]["deadline_at"] == 114.0
        bring_up_to_date(board.view, state, epoch=100.0, now=1013.0)  # nobody was heard for 1003 s
        assert board.snapshot()["open"]["deadline_at"] == 1167.0
        bring_up_to_date(board.view, state.replace(began_at=-86350.0), epoch=100.0, now=10.0)
        assert board.snapshot()["open"]["deadline_at"] == 150.0  # --max-round is a day


class TestRun:
    @pytest.mark.parametrize(
        ("events", "phase", "words"),
        [
            ((), "waiting", "starting"),
            ((STARTED, ("waiting", {"reason": "waiting for workers"})), "waiting", "waiting for"),
            ((STARTED, opened(2, "a", needed=1)), "open", "round 2 is open: 0 of 1 updates"),
            ((STARTED, ("closed", {"round": 1, "reason": "late"})), "committing", "averaging"),
            ((STARTED, ("finished", {"reason": "6 rounds are done"})), "ended", "finished: 6 rou"),
            ((STARTED, ("stopped", {"reason": "no quorum"})), "ended", "stopped: no quorum"),
            ((("standby", {"what": "runs/letters"}),), "standby", "standby"),
        ],
    )
    def test_the_phase_in_words(
        self, events: tuple[tuple[str, dict[str, Any]], ...], phase: str, words: str
    ) -> None:
        run = board_after(*events).run()
        assert run["phase"] == phase
        assert words in run["words"]

    def test_without_a_run_the_page_says_why(self) -> None:
        board = Board("letters", source="journal")
        board.link(True, "no coordinator has created federation letters")
        assert board.run()["words"] == "no coordinator has created federation letters"

    def test_a_run_that_goes_on_after_its_end_is_not_ended(self) -> None:
        board = board_after(
            STARTED, ("interrupted", {"folder": "x"}), ("resumed", {"run": RUN, "round": 1})
        )
        assert (board.run()["phase"], board.run()["outcome"]) == ("waiting", None)

    def test_the_link_of_the_coordinator_is_the_page_s(self) -> None:
        board = board_after(STARTED, CONNECTED)
        assert board.run()["linked"]
        board.add(200.0, from_fields("disconnected", {"reason": "reset"}))
        assert (board.run()["linked"], board.view.counters.outages) == (False, 1)
        assert "reset" in board.run()["link"]

    def test_beside_a_coordinator_its_link_is_not_ours(self) -> None:
        board = board_after(STARTED, ("disconnected", {"reason": "reset"}), source="journal")
        board.link(True, "linked")
        assert board.run()["linked"]

    def test_another_run_resets_the_view(self) -> None:
        board = board_after(STARTED, *JOINED, opened(1, "north"), counted("north", 1, 1), COMMITTED)
        board.add(200.0, from_fields("started", {"run": "another", "folder": "x"}))
        shown = board.snapshot()
        assert shown["rounds"] == []
        assert shown["workers"] == []  # those that are connected join the new run
        assert board.view.counters.rounds == 1  # what is counted for Prometheus never goes down

    def test_what_a_machine_that_waits_says(self) -> None:
        board = board_after(STARTED, CONNECTED)
        state = start(Rules(rounds=3, min_workers=2), RUN, now=5.0).replace(link=1)
        bring_up_to_date(board.view, state, epoch=1000.0, now=6.0)
        run = board.run()
        assert (run["phase"], run["round"], run["rounds"]) == ("waiting", 1, 3)
        assert run["words"].startswith("waiting for workers: 0 of 2 are connected")

    def test_a_run_is_not_interrupted_while_its_end_is_sent(self) -> None:
        board = board_after(STARTED, CONNECTED, opened(1, "north"))
        state = start(Rules(rounds=3), RUN, now=5.0).replace(link=1, phase=Phase.ENDED)
        bring_up_to_date(board.view, state, epoch=1000.0, now=6.0)
        assert board.run()["words"] == "round 1 is open: 0 of 1 updates"
        board.add(200.0, from_fields("stopped", {"reason": "no quorum"}))
        assert board.run()["words"] == "stopped: no quorum"


class TestRounds:
    def test_curves_have_a_value_or_none_for_each_evaluated_round(self) -> None:
        board = board_after(
            STARTED,
            COMMITTED,
            ("evaluated", {"round": 1, "loss": 0.5, "num_examples": 5, "metrics": {}}),
            ("committed", {"round": 2, "participants": ["north"], "timings": {}}),
            ("evaluated", {"round": 2, "loss": 0.25, "metrics": {"accuracy": 0.75}}),
            ("committed", {"round": 3, "participants": ["north"]}),
        )
        shown = board.snapshot()
        assert shown["curves"] == {
            "rounds": [1, 2],
            "loss": [0.5, 0.25],
            "accuracy": [None, 0.75],
        }
        assert [one["round"] for one in shown["rounds"]] == [1, 2, 3]
        phases = shown["rounds"][0]["phases"]  # nobody is known to have trained in it
        assert phases == {
            "waiting": 1.0, "training": 0.0, "transfer": 1.75, "aggregation": 0.25,
            "checkpoint": 0.0,
        }  # fmt: skip
        assert (latest(board.view, "accuracy"), latest(board.view, "loss")) == (0.75, 0.25)
        assert latest(board.view, "nonsense") is None

    def test_of_many_metrics_the_accuracy_is_among_those_of_a_live_page(self) -> None:
        metrics = {"accuracy": 0.5, **{f"AUC {number}": 0.5 for number in range(9)}}
        board = board_after(("evaluated", {"round": 1, "loss": 0.5, "metrics": metrics}))
        shown = board.snapshot()["curves"]
        assert list(shown) == ["rounds", "loss", "accuracy", *(f"AUC {n}" for n in range(5))]

    def test_history_is_shown_and_not_counted(self) -> None:
        board = Board("letters")
        board.view.remember(
            [
                committed(1, participant("north", num_examples=7))
                | evaluated(1, accuracy=0.25, evaluators=["north"])
            ]
        )
        board.add(100.0, from_fields("resumed", {"run": RUN, "round": 1}))
        shown = board.snapshot()
        assert shown["curves"] == {"rounds": [1], "loss": [0.5], "accuracy": [0.25]}
        assert shown["rounds"][0]["committed_at"] - shown["rounds"][0]["opened_at"] == 5.0
        assert [(row["name"], row["counted"], row["state"]) for row in shown["workers"]] == [
            ("north", 1, "gone")
        ]
        assert board.view.counters.rounds == 0
        assert shown["run"]["round"] == 2


class TestWorkers:
    def test_what_is_counted_of_each(self) -> None:
        board = board_after(
            STARTED,
            *JOINED,
            opened(1, "north", "south"),
            counted("north", 1, 1),
            ("late", {"worker": "south", "round": 1, "num_examples": 10}),
            rejected(worker="south", kind="update"),
        )
        rows = {row["name"]: row for row in board.snapshot()["workers"]}
        assert (rows["north"]["counted"], rows["north"]["late"]) == (1, 0)
        assert (rows["south"]["counted"], rows["south"]["late"]) == (0, 1)
        assert rows["south"]["rejected"] == 1

    def test_a_name_in_a_refused_message_is_nobody(self) -> None:
        board = board_after(STARTED, rejected(worker="mallory", kind="update"))
        assert board.snapshot()["workers"] == []

    def test_an_old_farewell_does_not_undo_a_newer_sign_of_life(self) -> None:
        workers = Workers()
        workers.sign_of_life(50.0, "north", worker("north"))
        farewell = from_fields("left", {"worker": "north", "reason": "stopped by its owner"})
        workers.add(40.0, farewell)
        assert workers.by_state()["training"] == 1
        workers.add(60.0, farewell)
        assert workers.by_state()["left"] == 1

    def test_a_worker_that_died_while_no_coordinator_was_there_is_gone(self) -> None:
        resumed = ("resumed", {"run": RUN, "round": 1, "folder": "runs/letters"})
        board = board_after(STARTED, *JOINED, source="journal")
        for name, seen_at in (("north", 102.5), ("south", 104.0)):
            board.view.workers.sign_of_life(seen_at, name, worker(name, step=1, steps=2))
        board.view.add(103.0, from_fields(*resumed))
        states = {row["name"]: row["state"] for row in board.snapshot()["workers"]}
        assert states == {"north": "gone", "south": "training"}
        board.view.workers.sign_of_life(105.0, "north", worker("north"))
        assert board.view.workers.by_state()["training"] == 2

    def test_whoever_is_here_comes_first(self) -> None:
        board = board_after(*JOINED, ("gone", {"worker": "north", "silent_s": 9.0}))
        assert [row["name"] for row in board.snapshot()["workers"]] == ["south", "north"]

    def test_a_worker_of_an_earlier_round_is_said_to_be_behind(self) -> None:
        workers = Workers()
        workers.sign_of_life(1.0, "north", worker("north", round=3, step=1, steps=2))
        assert workers["north"].doing(4) == "training 1/2 for round 3"

    def test_those_on_the_page_are_bounded(self) -> None:
        refused = [("refused", {"worker": f"w{n}", "reason": "classes"}) for n in range(2500)]
        joined = ("joined", {"worker": "north", "num_examples": 10})
        shown = board_after(*refused, joined, counted("north", 1, 1)).snapshot()
        assert len(shown["workers"]) == 2000
        assert shown["people"] == {"known": 2501, "connected": 1, "counted": 1, "late": 0}

    def test_a_worker_that_answers_again_has_no_failure_any_more(self) -> None:
        failed = ("failure", {"worker": "north", "round": 1, "reason": "out of memory"})
        board = board_after(*JOINED, opened(1, "north"), failed)
        assert [row["why"] for row in board.snapshot()["workers"]] == ["out of memory", ""]
        board.add(200.0, from_fields(*counted("north", 1, 1)))
        assert [row["why"] for row in board.snapshot()["workers"]] == ["", ""]

    def test_what_it_sent_and_how_long_it_trained(self) -> None:
        rounds = [
            told_of for n in (1, 2) for told_of in (opened(n, "north"), counted("north", n, 1))
        ]
        [row] = board_after(STARTED, *rounds).snapshot()["workers"]
        assert (row["counted"], row["bytes"], row["train_s"]) == (2, 2000, 0.5)


class TestManyWorkers:
    def test_only_the_workers_in_the_matrix_are_named(self) -> None:
        names = [f"w{number:04}" for number in range(1000)]
        rows = [committed(n, *map(participant, names), asked=["x"]) for n in range(1, 51)]
        board = Board("letters")
        board.view.remember(rows)
        shown = board.snapshot()
        assert shown["unlisted"] == 921  # of 1,001; the matrix has 4,000 cells
        for row in shown["rounds"]:
            assert (row["updates"], row["participants"]) == (1000, names[:80])
            assert (len(row["examples"]), row["asked"]) == (80, [])
        assert len(json_line(shown["rounds"])) < 100_000

    def test_empty_queues_of_a_kind_share_a_row_unless_one_lacks_its_consumer(self) -> None:
        figures = [
            {
                "name": f"letters.{kind}.w{number}",
                "ready": 0,
                "unacknowledged": 0,
                "consumers": int(kind == "inbox" and number != 7),
                "size_bytes": 1,
            }
            for kind in ("inbox", "outbox")
            for number in range(1000)
        ]
        figures[3]["ready"] = 1
        board = Board("letters")
        board.queues(figures)
        shown = {each["name"]: each for each in board.snapshot()["queues"]["figures"]}
        assert list(shown) == [
            "letters.inbox.w3", "letters.inbox.* (998 empty)", "letters.inbox.w7",
            "letters.outbox.* (1000 empty)",
        ]  # fmt: skip
        assert shown["letters.inbox.* (998 empty)"]["consumers"] == 998
        assert shown["letters.outbox.* (1000 empty)"]["size_bytes"] == 1000
        assert len(board.figures) == 2000  # the metrics add up all


class TestAsynchrony:
    def test_staleness_is_there_when_it_is_told(self) -> None:
        board = Board("letters")
        there = [
            participant("a", num_examples=100, staleness=0, weight=100.0),
            participant("b", num_examples=100, staleness=3, weight=50.0),
            participant("c", num_examples=50),  # a fresh one, as a coordinator writes it
        ]
        board.view.remember([committed(1, *there, epsilon=1.5)])
        shown = board.snapshot()
        assert shown["staleness"] == {"counts": {"0": 2, "3": 1}, "lost": 0.2}
        assert shown["curves"] == {"rounds": [1], "epsilon": [1.5]}
        assert board_after(STARTED, COMMITTED).snapshot()["staleness"] is None

    def test_a_worker_that_is_counted_twice_in_a_round_has_two_updates(self) -> None:
        events = [opened(1, "a", "b"), counted("a", 1, 1), counted("a", 1, 2)]
        board = board_after(STARTED, *events)
        answered = board.snapshot()["open"]["answered"]
        assert [one["worker"] for one in answered] == ["a", "a"]
        assert len({one["key"] for one in answered}) == 2
        board.add(110.0, from_fields("committed", {"round": 1, "participants": ["a"]}))
        (row,) = board.snapshot()["rounds"]
        assert (row["updates"], row["participants"], row["examples"]) == (2, ["a"], [20])


class TestRefusals:
    def test_the_reason_is_the_same_everywhere(self) -> None:
        board = board_after(
            STARTED, rejected("tensor 'a' is NaN", worker="north", round=3, kind="update")
        )
        shown = board.snapshot()
        latest = shown["rejected"]["latest"][-1]
        assert latest["reason"] == "tensor 'a' is NaN"
        assert (latest["cause"], latest["worker"], latest["round"]) == ("not_finite", "north", 3)
        assert "tensor 'a' is NaN" in shown["journal"][-1]["text"]
        assert (shown["rejected"]["causes"], shown["rejected"]["total"]) == ({"not_finite": 1}, 1)
        assert board.view.counters.causes["not_finite"] == 1
        assert board.view.counters.outcomes["rejected"] == 1

    def test_causes_are_bounded(self) -> None:
        board = board_after(
            *[("rejected", {"reason": "?", "cause": f"made up {n}"}) for n in range(50)]
        )
        assert set(board.view.counters.causes) <= set(CAUSES)

    def test_a_bad_heartbeat_is_no_bad_update(self) -> None:
        board = board_after(rejected(kind="heartbeat"))
        assert board.view.counters.outcomes["rejected"] == 0
        assert board.view.counters.causes["not_finite"] == 1


class TestJournal:
    def test_waiting_is_said_once_however_often_it_is_told(self) -> None:
        board = board_after(STARTED, *[("waiting", {"reason": f"{n} missing"}) for n in (3, 2, 1)])
        lines = board.snapshot()["journal"]
        assert [line["text"] for line in lines[1:]] == ["1 missing"]

    def test_it_is_bounded_and_its_lines_keep_their_ids(self) -> None:
        board = board_after(*[("left", {"worker": "x", "reason": str(n)}) for n in range(300)])
        before = board.snapshot()["journal"]
        board.add(500.0, from_fields("left", {"worker": "x", "reason": "the last"}))
        after = board.snapshot()["journal"]
        assert len(before) == len(after) == 100
        assert [line["id"] for line in before[1:]] == [line["id"] for line in after[:-1]]

    def test_long_texts_are_cut(self) -> None:
        shown = board_after(rejected("x" * 5000)).snapshot()
        assert len(shown["journal"][0]["text"]) <= 600
        assert len(shown["rejected"]["latest"][0]["reason"]) <= 500


def test_what_json_cannot_say_becomes_null_or_text() -> None:
    assert json.loads(json_line({"a": float("nan"), "b": b"x", "c": {1}})) == {
        "a": None,
        "b": "x",
        "c": [1],
    }
    not_unicode = {"file": "\udcff", "stall_s": [float("inf")]}  # as in a file name
    assert json_line(not_unicode) == '{"file":"\\udcff","stall_s":[null]}'


names = st.sampled_from(["north", "south", "east"])
numbers = st.integers(1, 4)
events = st.one_of(
    st.builds(lambda n, a: opened(n, *a), numbers, st.sets(names, min_size=1)),
    st.builds(counted, names, numbers, numbers),
    st.builds(lambda w: ("joined", {"worker": w, "num_examples": 5}), names),
    st.builds(lambda w: ("gone", {"worker": w, "silent_s": 3.0}), names),
    st.builds(lambda w, n: ("late", {"worker": w, "round": n}), names, numbers),
    st.builds(
        lambda n, p: ("committed", {"round": n, "participants": sorted(p)}), numbers, st.sets(names)
    ),
    st.builds(
        lambda n, x: ("evaluated", {"round": n, "loss": x, "metrics": {}}), numbers, st.floats()
    ),
    st.just(STARTED),
    st.just(("started", {"run": "another", "folder": "y"})),
    st.just(rejected()),
    st.just(("disconnected", {"reason": "cut"})),
    st.just(("finished", {"reason": "done"})),
)


@given(st.lists(events, max_size=30))
def test_whatever_happens_there_is_a_page(happened: list[tuple[str, dict[str, Any]]]) -> None:
    board = board_after(*happened)
    shown = board.snapshot()
    json.loads(json_line(shown))
    assert len({len(curve) for curve in shown["curves"].values()}) == 1
    assert len({row["name"] for row in shown["workers"]}) == len(shown["workers"])
    if shown["open"] is not None:
        answered = {one["worker"] for one in shown["open"]["answered"]}
        assert not answered & {one["worker"] for one in shown["open"]["missing"]}
    assert set(board.view.counters.outcomes) <= set(OUTCOMES)
