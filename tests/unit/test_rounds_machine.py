"""Both machines together, under random interleavings of everything that can happen to them.

This file has the moves; ``federation_model`` has the model and its invariants.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import ModuleType

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fluffle_coordinator.machine import machine as rounds
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QUORUM, QuorumRounds
from fluffle_coordinator.machine.state import Quorum, Rules, State
from fluffle_worker import machine as session
from tests.unit.federation_model import RUN, Identity, Message, Order, World

NAMES = "abcd"
workers = st.sampled_from(NAMES)
flaws = st.sampled_from(["", "", "", "bad", "torn"])
rules = st.builds(
    Rules,
    rounds=st.integers(1, 5),
    least=st.sampled_from([1, 1, 2]),
    min_workers=st.integers(1, 3),
    quorum=st.sampled_from([Quorum(), Quorum(fraction=0.5), Quorum(number=1), Quorum(number=2)]),
    grace_s=st.sampled_from([0.0, 0.0, 3.0]),
    deadline_s=st.just(30.0),
    on_deadline=st.sampled_from(["reopen", "reopen", "close", "stop"]),
    fraction=st.sampled_from([1.0, 1.0, 0.5]),
    max_reopenings=st.integers(1, 2),
    wait_s=st.just(120.0),
)
# Half of the runs are synchronous.
schedules = st.one_of(
    st.sampled_from([QUORUM, QUORUM, QuorumRounds(max_staleness=2)]),
    st.builds(
        Buffered,
        buffer=st.integers(1, 3),
        concurrency=st.sampled_from([None, None, 1, 2]),
        max_staleness=st.integers(0, 3),
    ),
)


class Federation(RuleBasedStateMachine):
    """The moves: a coordinator and its workers run from the start; faults come later."""

    machine: ModuleType = rounds
    worker_machine: ModuleType = session

    @initialize(
        rules=rules,
        schedule=schedules,
        names=st.integers(2, 4),
        first_weights=st.booleans(),
        frozen=st.sampled_from(["", "", "digest"]),
        afresh=st.booleans(),
    )
    def start(
        self,
        rules: Rules,
        schedule: Schedule[State],
        names: int,
        first_weights: bool,
        frozen: str,
        afresh: bool,
    ) -> None:
        self.afresh = afresh
        if schedule.continuous:  # asynchronous rounds with a fraction are refused as options
            rules = replace(rules, fraction=1.0)
        self.world = World(
            rules,
            NAMES,
            first_weights=first_weights,
            schedule=schedule,
            frozen=frozen,
            machine=self.machine,
            worker_machine=self.worker_machine,
        )
        self.world.start_coordinator()
        self.coordinator.connect()
        for name in NAMES[:names]:
            self.world.workers[name].begin()

    @property
    def coordinator(self):
        return self.world.coordinator

    # --- progress, in large steps and in small ones ---

    @rule(beats=st.integers(1, 8))
    def all_is_well_for_a_while(self, beats):
        self.world.start_coordinator()
        self.coordinator.connect()
        for _ in range(beats):
            self.world.run()
            self.world.beat()

    @rule(steps=st.integers(1, 80))
    def they_work(self, steps):
        self.world.run(steps)

    @rule(
        step=st.sampled_from(
            [
                "read_update",
                "read_presence",
                "take_event",
                "aggregate_one",
                "write_one",
                "send_one",
                "tick",
            ]
        ),
        times=st.integers(1, 4),
    )
    def coordinator_steps(self, step, times):
        for _ in range(times):
            if self.coordinator is not None:
                getattr(self.coordinator, step)()

    @rule(name=workers, step=st.sampled_from(["read", "finish", "finish_unwanted", "heartbeat"]))
    def worker_steps(self, name, step):
        getattr(self.world.workers[name], step)()

    @rule(name=workers, flaw=flaws, confirmed=st.sampled_from([True, True, False]))
    def worker_sends(self, name, flaw, confirmed):
        self.world.workers[name].send(flaw=flaw, confirmed=confirmed)

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0, 15.0, 31.0]))
    def the_clock_jumps(self, seconds):
        self.world.now += seconds

    @rule()
    def the_model_is_of_another_size(self):
        self.world.in_parts = not self.world.in_parts

    @rule(beats=st.integers(1, 10), first=st.sampled_from(["tick", "read_presence", "read_update"]))
    def the_coordinator_is_stopped(self, beats, first):
        """Let heartbeats pile up while the coordinator is stopped; then it takes one step."""
        for _ in range(beats):
            self.world.beat()
        if self.coordinator is not None:
            getattr(self.coordinator, first)()

    # --- who comes and goes ---

    @rule(again=st.sampled_from(["at once", "at once", "without a link", "later"]))
    def coordinator_crashes(self, again):
        self.world.crash_coordinator()
        if again != "later":
            self.world.start_coordinator()
            if again == "at once":
                self.coordinator.connect()

    @rule(what=st.sampled_from(["connect", "lose_link", "break_off_fold"]), again=st.booleans())
    def coordinator_link(self, what, again):
        if self.coordinator is not None:
            getattr(self.coordinator, what)()
            if again:
                self.coordinator.connect()

    @rule(
        name=workers,
        what=st.sampled_from(["begin", "begin", "crash", "leave"]),
        again=st.booleans(),
    )
    def worker_process(self, name, what, again):
        getattr(self.world.workers[name], what)()
        if again:
            self.world.workers[name].begin()

    @rule(name=workers, what=st.sampled_from(["connect", "lose_link"]))
    def worker_link(self, name, what):
        if self.world.workers[name].alive:
            getattr(self.world.workers[name], what)()

    @rule(name=workers)
    def worker_fails(self, name):
        self.world.workers[name].finish("failed")

    @rule(name=workers)
    def worker_has_more_or_less_to_do(self, name):
        self.world.workers[name].slow = not self.world.workers[name].slow

    # --- what a broker does to messages ---

    @rule(name=workers, what=st.sampled_from(["work", "heartbeats"]))
    def transient_messages_are_lost(self, name, what):
        inbox = self.world.broker.inboxes[name]
        if what == "work":
            others = [order for order in inbox if order.kind not in ("fit", "evaluate")]
            inbox.clear()
            inbox.extend(others)
        else:
            self.world.broker.presence.clear()
            for worker in self.world.workers.values():
                worker.unheard = True

    @rule(name=workers)
    def old_work_comes_again(self, name):
        committed = len(self.world.disk.history)
        if committed:
            order = Order("fit", RUN, committed, self.world.disk.bases[committed - 1])
            self.world.broker.inboxes[name].append(order)
            self.world.workers[name].read()

    @rule(
        name=workers,
        what=st.sampled_from(["copy", "copy", "another round", "another run"]),
        ahead=st.integers(-2, 2),
        foreign=st.booleans(),
        flaw=flaws,
    )
    def updates_that_nobody_sent(self, name, what, ahead, foreign, flaw):
        committed = len(self.world.disk.history)
        number = max(1, committed + 1 + ahead)
        bases = self.world.disk.bases
        base = "elsewhere" if foreign or number > len(bases) else bases[number - 1]
        identity = Identity(RUN, number, name, base)
        if what == "another run":
            identity = Identity("run-b", committed + 1, name, base)
        if what == "copy":
            updates = [m.identity for m in self.world.broker.published if m.kind == "update"]
            if not updates:
                return
            identity = updates[-1]
        self.world.broker.publish(Message("update", identity, flaw))

    # --- invariants ---

    @invariant()
    def holds(self):
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.settle(afresh=self.afresh)


PROFILE = settings(
    max_examples=5 * settings.default.max_examples,  # 300 by default, 25,000 in a search
    stateful_step_count=60,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestFederation = Federation.TestCase
TestFederation.settings = PROFILE


def test_without_faults_a_run_finishes():
    world = World(Rules(rounds=3, min_workers=4), NAMES, first_weights=False)
    world.start_coordinator()
    for worker in world.workers.values():
        worker.begin()
    world.settle()
    assert world.disk.history == [frozenset(NAMES)] * 3
    assert world.disk.evaluated == {1, 2, 3}
    assert world.coordinator.state.outcome == "finished"
    assert not any(worker.alive for worker in world.workers.values())
    assert not world.broker.updates
    assert not world.broker.unacked


def test_a_restart_before_the_first_commit_issues_no_ticket_anew():
    schedule = Buffered(buffer=1, max_staleness=0)
    rules = Rules(rounds=5, min_workers=1, max_reopenings=1)
    world = World(rules, NAMES, first_weights=True, schedule=schedule)
    world.in_parts = True
    world.start_coordinator()
    world.coordinator.connect()
    for name in "ab":
        world.workers[name].begin()
    for step, times in (("read_presence", 3), ("take_event", 4)):
        for _ in range(times):
            getattr(world.coordinator, step)()
    assert {name for name, _ in world.tickets} == {"a", "b"}
    world.workers["b"].lose_link()  # the other work is not sent
    world.settle(afresh=True)  # checks each ticket that is issued
    assert world.coordinator.state.outcome == "finished"
