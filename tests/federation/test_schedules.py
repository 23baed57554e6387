"""Federations under each schedule: asynchronous, with late updates, and from a user's file."""

from __future__ import annotations

import asyncio
import heapq
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fluffle_common.errors import TaskError, UsageError
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QuorumRounds
from fluffle_coordinator.machine.staleness import Discount
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.storage.replay import replay
from fluffle_coordinator.user_code.schedule_loading import load_schedule
from tests.federation.harness import Adder

SIXTEEN = [100.0] * 5 + [200.0] * 5 + [400.0] * 6
EXTRA_S = 5.0


def check_weights(federation, values):
    """Check every model against an average weighted by examples / sqrt(1 + staleness)."""
    expected = 0.0
    for line in federation.history():
        there = line["participants"]
        weights = [one["num_examples"] * (1 + one.get("staleness", 0)) ** -0.5 for one in there]
        learnt = [values[one["worker"]] for one in there]
        expected += float(np.average(learnt, weights=weights))
        np.testing.assert_allclose(federation.weights(line["round"])["w"], expected, rtol=1e-6)


def tickets(federation):
    return [
        (one["worker"], one["sequence"])
        for line in federation.history()
        for one in line["participants"]
    ]


def time_of(updates: int, seconds: list[float]) -> float:
    """Return when this many updates have arrived if no worker ever waits."""
    due = [(each, number) for number, each in enumerate(seconds)]
    heapq.heapify(due)
    for _ in range(updates):
        now, number = heapq.heappop(due)
        heapq.heappush(due, (now + seconds[number], number))
    return now


def test_asynchronous_training_is_faster_with_three_speeds_of_workers(federated):
    """Compare rounds with asynchronous training, for trainings of 100, 200 and 400 s."""
    took, updates = {}, 128

    def scenario_with(name, rounds, schedule):
        async def scenario(federation):
            federation.folder = federation.folder.with_name(name)
            for number, seconds in enumerate(SIXTEEN):
                step_s = (seconds + EXTRA_S) / 5
                task = Adder(federation.loop, steps=5, step_s=step_s)
                federation.worker(f"w{number}", task, heartbeat_s=60.0)
            coordinator = federation.coordinator(
                rounds=rounds, schedule=schedule, min_workers=16, deadline_s=6000
            )
            await coordinator.log.until("opened")
            began = time.monotonic()
            await coordinator.log.until("committed", rounds, within_s=1e5)
            took[name] = time.monotonic() - began
            assert len(tickets(federation)) == len(set(tickets(federation))) >= updates

        return scenario

    federated(scenario_with("rounds", updates // 16, QuorumRounds()))
    federated(scenario_with("buffered", updates // 4, Buffered(buffer=4, max_staleness=100)))
    seconds = [one + EXTRA_S for one in SIXTEEN]
    expected = (updates // 16 * max(seconds)) / time_of(updates, seconds)
    assert expected > 2
    assert took["rounds"] / took["buffered"] == pytest.approx(expected, rel=0.05)


def test_a_slow_worker_counts_with_a_discount_and_is_shown(federated):
    async def scenario(federation):
        values = {"a": 1.0, "b": 2.0, "slow": 10.0}
        federation.worker("a", Adder(federation.loop, value=1.0))
        federation.worker("b", Adder(federation.loop, value=2.0, num_examples=30))
        federation.worker("slow", Adder(federation.loop, value=10.0, step_s=2.5))
        coordinator = federation.coordinator(rounds=30, schedule=Buffered(buffer=2), min_workers=3)
        assert (await coordinator.end()).outcome == "finished"
        check_weights(federation, values)
        slow = [
            one
            for line in federation.history()
            for one in line["participants"]
            if one["worker"] == "slow"
        ]
        assert len(slow) >= 2
        for one in slow:
            assert one["staleness"] >= 3
            assert one["discount"] == (1 + one["staleness"]) ** -0.5
        counted = [one for one in coordinator.log.of("counted") if one["worker"] == "slow"]
        assert [one["staleness"] for one in counted] == [one["staleness"] for one in slow]
        evaluated = [line["round"] for line in federation.history("evaluated")]
        assert sorted(evaluated) == list(range(1, 31))

    federated(scenario)


def test_a_single_worker_fills_a_buffer_with_different_updates(federated):
    async def scenario(federation):
        task = Adder(federation.loop)
        federation.worker("a", task)
        coordinator = federation.coordinator(rounds=2, schedule=Buffered(buffer=3), min_workers=1)
        await coordinator.end()
        assert [len(line["participants"]) for line in federation.history()] == [3, 3]
        assert (
            len(set(task.trained)) == len(task.trained) >= 6
        )  # each training has a different seed

    federated(scenario)


def test_no_more_workers_train_than_the_concurrency_allows(federated):
    async def scenario(federation):
        at_work, most = set(), 0

        class Counted(Adder):
            def train(self, weights, plan, progress):
                nonlocal most
                at_work.add(self)
                most = max(most, len(at_work))
                try:
                    return super().train(weights, plan, progress)
                finally:
                    at_work.discard(self)

            __hash__ = object.__hash__

        for name in "abcdef":
            federation.worker(name, Counted(federation.loop))
        schedule = Buffered(buffer=4, concurrency=2)
        coordinator = federation.coordinator(rounds=6, schedule=schedule, min_workers=6)
        await coordinator.end()
        assert most == 2
        assert {worker for worker, _ in tickets(federation)} == set("abcdef")

    federated(scenario)


def test_a_too_stale_update_is_discarded_and_its_worker_continues(federated):
    async def scenario(federation):
        federation.worker("a")
        federation.worker("slow", Adder(federation.loop, step_s=2.5))
        schedule = Buffered(buffer=1, max_staleness=2)
        coordinator = federation.coordinator(rounds=30, schedule=schedule)
        await coordinator.end()
        late = coordinator.log.of("late")
        assert len(late) >= 2
        assert {one["worker"] for one in late} == {"slow"}
        assert all(worker == "a" for worker, _ in tickets(federation))
        assert sum(line["late"] for line in federation.history()) >= 2

    federated(scenario)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_coordinator_killed_in_every_version_loses_no_update(federated, how):
    async def scenario(federation):
        values = {"a": 1.0, "b": 2.0, "c": 4.0}
        tasks = {
            name: Adder(federation.loop, value=value, step_s=0.1 + 0.1 * value)
            for name, value in values.items()
        }
        workers = [federation.worker(name, task) for name, task in tasks.items()]
        schedule = Buffered(buffer=2, max_staleness=50)
        rounds = 8
        for lost_in in range(1, rounds):
            coordinator = federation.coordinator(rounds=rounds, schedule=schedule)
            while len(federation.history()) < lost_in:
                await coordinator.log.until("committed", len(coordinator.log.of("committed")) + 1)
            await coordinator.log.until("counted", len(coordinator.log.of("counted")) + 1)
            assert not coordinator.log.of("late")
            await getattr(coordinator, how)()
        coordinator = federation.coordinator(rounds=rounds, schedule=schedule)
        assert (await coordinator.end()).outcome == "finished"
        check_weights(federation, values)
        counted = tickets(federation)
        assert len(counted) == len(set(counted))
        # Every update counts, except the ones in progress when the run ended.
        sent = sum(len([1 for one in w.log.of("sent") if one["kind"] == "fit"]) for w in workers)
        assert sent - len(counted) <= len(workers)
        assert {worker for worker, _ in counted} == set(values)

    federated(scenario)


def test_every_version_is_replayed_bit_for_bit(federated, tmp_path):
    async def scenario(federation):
        for number, name in enumerate("abc"):
            task = Adder(federation.loop, value=0.1 + number, step_s=0.1 + number, num_examples=7)
            federation.worker(name, task)
        coordinator = federation.coordinator(
            rounds=12, schedule=Buffered(buffer=2), min_workers=3, keep_updates=True
        )
        await coordinator.end()
        stale = [
            one.get("staleness", 0) for line in federation.history() for one in line["participants"]
        ]
        assert max(stale) > 0
        for number in range(1, 13):
            assert replay(federation.folder, number).equal, number

    federated(scenario)


def test_stale_updates_in_parts_count(federated, in_small_parts):
    async def scenario(federation):
        size = 2**12 + 1  # two parts
        for name in "abc":  # their updates arrive together: some wait while a version is closed
            federation.worker(name, Adder(federation.loop, size=size))
        federation.worker("slow", Adder(federation.loop, size=size, step_s=1.0))
        schedule = Buffered(buffer=1)
        coordinator = federation.coordinator(rounds=20, schedule=schedule, min_workers=4)
        await coordinator.end()
        check_weights(federation, {"a": 1.0, "b": 1.0, "c": 1.0, "slow": 1.0})
        assert any(worker == "slow" for worker, _ in tickets(federation))
        assert not coordinator.log.of("resend")
        stale = [
            one.get("staleness", 0) for line in federation.history() for one in line["participants"]
        ]
        assert max(stale) >= 2

    federated(scenario)


def test_late_updates_count_in_the_next_round_with_late_discount(federated):
    async def scenario(federation):
        values = {"a": 1.0, "b": 1.0, "c": 1.0, "slow": 5.0}
        for name, value in values.items():
            step_s = 0.6 if name == "slow" else 0.25
            federation.worker(name, Adder(federation.loop, value=value, step_s=step_s))
        schedule = QuorumRounds(max_staleness=3)
        coordinator = federation.coordinator(
            rounds=20, schedule=schedule, min_workers=4, number=1, fraction=0.5
        )
        await coordinator.end()
        check_weights(federation, values)
        stale = [
            one
            for line in federation.history()
            for one in line["participants"]
            if one.get("staleness")
        ]
        assert stale
        assert {one["worker"] for one in stale} >= {"slow"}
        for line in federation.history():  # a stale update closes no round
            assert any(not one.get("staleness") for one in line["participants"])

    federated(scenario)


def test_a_schedule_from_a_file(federated):
    where = Path(__file__).parent / "windows.py"
    schedule = load_schedule(f"{where}:minutes")
    assert str(schedule) == "windows.py:minutes"

    async def scenario(federation):
        federation.workers(2)
        federation.worker("slow", Adder(federation.loop, step_s=20.0))
        coordinator = federation.coordinator(rounds=3, schedule=schedule, min_workers=3)
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a", "b"]] * 3
        times = [at for at, what, _ in coordinator.log.lines if what == "committed"]
        assert all(later - at >= 60 for at, later in pairwise(times))

    federated(scenario)


def test_a_schedule_that_never_closes_a_round_is_overruled(federated, tmp_path):
    original = (Path(__file__).parent / "windows.py").read_text()
    never = original.replace("window_s: float = 60.0", "window_s: float = float('inf')")
    (tmp_path / "never.py").write_text(never)
    schedule = load_schedule(f"{tmp_path}/never.py:minutes")

    async def scenario(federation):
        federation.workers(2)
        coordinator = federation.coordinator(rounds=2, schedule=schedule, max_round_s=300)
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a", "b"]] * 2

    federated(scenario)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("needed(self, state): return 'two'", "in needed(): it returned 'two', not a number"),
        ("cohort(self, state): return ['nobody']", "it selected 'nobody', but no such worker"),
        ("cohort(self, state): return state.nothing", "in cohort(): AttributeError"),
        ("closes(self, state, now): raise SystemExit(3)", "in closes(): SystemExit"),
        (
            "closes(self, state, now): import numpy; return numpy.zeros(2)",
            "in closes(): ValueError: The truth value of an array",
        ),
        ("needed(self, state): return float('inf')", "in needed(): it returned inf, not a whole"),
        ("needed(self, state): return 10**9999", "in needed(): it returned a number above 1e308"),
        ("needed(self, state): return 0", "in needed(): it returned 0, not a whole number of at"),
        ("cohort(self, state): return None", "it returned None, not the names of workers"),
        ("cohort(self, state): return 'a'", "it returned 'a', not the names of workers"),
        ("cohort(self, state): return [['a']]", "it selected ['a'], but no such worker is conn"),
        ("cohort(self, state): return (1 / 0 for _ in 'a')", "in cohort(): ZeroDivisionError"),
        (
            "discount(self, staleness): return 0\n\n    continuous = True",
            "in discount(): it returned 0 for the staleness 0, so no update counts",
        ),
    ],
)
def test_a_failing_user_schedule_ends_the_run(federated, tmp_path, method, message):
    original = (Path(__file__).parent / "windows.py").read_text()
    broken = original.replace("minutes = Windows()", f"    def {method}\n\n\nminutes = Windows()")
    (tmp_path / "broken.py").write_text(broken)
    schedule = load_schedule(f"{tmp_path}/broken.py:minutes")

    async def scenario(federation):
        federation.workers(2)
        coordinator = federation.coordinator(rounds=2, schedule=schedule)
        with pytest.raises(TaskError, match=re.escape(message)) as wrong:
            await coordinator.end()
        assert "no update is lost" in str(wrong.value)

    federated(scenario)


def test_a_user_schedule_may_return_numbers_of_numpy(federated, tmp_path):
    original = (Path(__file__).parent / "windows.py").read_text()
    numpy = original.replace("return 1\n", "return np.int64(1)\n").replace(
        "return state.opened_at + self.window_s", "return np.float32(state.opened_at + 60)"
    )
    (tmp_path / "numpy_windows.py").write_text(
        numpy.replace("import dataclass\n", "import dataclass\n\nimport numpy as np\n")
    )
    schedule = load_schedule(f"{tmp_path}/numpy_windows.py:minutes")

    async def scenario(federation):
        federation.workers(2)
        coordinator = federation.coordinator(rounds=2, schedule=schedule)
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a", "b"]] * 2

    federated(scenario)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("-1", UsageError, "has max_staleness = -1; set max_staleness to at least 0"),
        ("None", UsageError, "is not a schedule: this Windows lacks max_staleness (int)"),
        ("1 / 0", TaskError, "the schedule broken.py:minutes failed in max_staleness: ZeroDiv"),
    ],
)
def test_the_staleness_of_a_user_schedule_is_checked(tmp_path, value, error, message):
    original = (Path(__file__).parent / "windows.py").read_text()
    field = f"    @property\n    def max_staleness(self):\n        return {value}\n\n\n"
    broken = original.replace("minutes = Windows()", f"{field}minutes = Windows()")
    (tmp_path / "broken.py").write_text(broken)
    with pytest.raises(error, match=re.escape(message)):
        load_schedule(f"{tmp_path}/broken.py:minutes")


def test_a_deadline_reissues_lost_work(federated):
    async def scenario(federation):
        hangs = Adder(federation.loop, odd=lambda step: step == 2 and federation.loop.sleep(1e9))
        federation.worker("hangs", hangs)
        a = federation.worker("a")
        schedule = Buffered(buffer=4, concurrency=1)
        coordinator = federation.coordinator(
            rounds=2, schedule=schedule, deadline_s=60, max_reopenings=5, max_round_s=3000
        )
        await asyncio.sleep(30)
        await a.stop()
        federation.worker("a2")
        assert (await coordinator.end()).outcome in ("finished", "stopped")
        assert coordinator.service.state.reason

    federated(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "async", "max_staleness": 3}, "unknown schedule 'async'"),
        ({"buffer": 3}, "--buffer needs --schedule buffered; add --schedule buffered, or remove"),
        ({"staleness": Discount()}, "--staleness needs"),
        ({"name": "buffered", "late": "discount"}, "--late discount needs --schedule quorum"),
        ({"name": f"{Path(__file__).parent}/windows.py:Windows"}, "is a class"),
        (
            {"name": f"{Path(__file__).parent}/windows.py:dataclass"},
            "such as my_dataclass = dataclass()",
        ),
        ({"name": f"{Path(__file__).parent}/windows.py:x"}, "has no 'x'"),
    ],
)
def test_conflicting_schedule_options_are_refused_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as refused:
        load_schedule(**options)
    assert "\n" not in str(refused.value)


def test_a_worker_that_stays_is_asked_again_when_a_run_that_stopped_while_it_trained_goes_on(
    federated,
):
    async def scenario(federation):
        rules = {"rounds": 1, "min_workers": 1, "schedule": Buffered(buffer=1)}
        federation.worker("a", Adder(federation.loop, step_s=30.0), stay=True)
        stopped = federation.coordinator(deadline_s=20.0, on_deadline="stop", **rules)
        assert (await stopped.end()).outcome == "stopped"
        await asyncio.sleep(60.0)  # until the training has noticed
        continued = federation.coordinator(**rules)
        assert (await continued.end(within_s=200.0)).outcome == "finished"

    federated(scenario)


def test_each_coordinator_of_an_asynchronous_run_has_tickets_of_its_own(federated):
    async def scenario(federation):
        sequences = []
        for _ in range(3):
            coordinator = federation.coordinator(min_workers=1, schedule=Buffered(buffer=1))
            await coordinator.log.until("connected")
            sequences.append(coordinator.service.state.sequence)
            await coordinator.kill()
        assert sequences == [10_000, 20_000, 30_000]

    federated(scenario)


def test_after_an_error_of_a_schedule_no_other_update_changes_the_run(federated, monkeypatch):
    """An update that is in the sum, but not in the machine's state, would count twice."""
    monkeypatch.setattr(Journal, "drained", lambda *_: asyncio.sleep(2.0))
    failed = []

    class Flaky(Buffered):
        def idle(self, state, worker):
            if not failed:
                failed.append(worker)
                raise TaskError("it fails once")
            return super().idle(state, worker)

    async def scenario(federation):
        for number, name in enumerate("abc"):
            federation.worker(name, Adder(federation.loop, step_s=0.25 + 0.1 * number))
        coordinator = federation.coordinator(min_workers=3, schedule=Flaky(buffer=2))
        with pytest.raises(TaskError, match="it fails once"):
            await coordinator.end()
        assert failed == ["a"]
        assert federation.history() == []
        await federation.coordinator(min_workers=3, schedule=Flaky(buffer=2)).end()
        assert len(set(tickets(federation))) == len(tickets(federation)) >= 6

    federated(scenario)


@pytest.mark.parametrize("call", range(1, 7))
def test_an_error_in_a_schedules_wakeup_ends_the_run_whoever_calls_it(federated, call):
    class Failing(QuorumRounds):
        def wakeup(self, state):
            calls.append(state)
            if len(calls) == call:
                raise TaskError("no time is known")
            return super().wakeup(state)

    calls, unhandled = [], []

    async def scenario(federation):
        federation.loop.set_exception_handler(lambda _, context: unhandled.append(context))
        federation.worker("a")
        federation.worker("b", Adder(federation.loop, step_s=100.0))
        coordinator = federation.coordinator(
            rounds=1, number=1, min_workers=2, grace_s=60.0, schedule=Failing()
        )
        with pytest.raises(TaskError, match="no time is known"):
            await coordinator.end()
        assert unhandled == []

    federated(scenario)
