"""Both machines together, under random interleavings of everything that can happen to them.

``federation_model`` has the model and what must hold of it; here are the moves.
"""

from __future__ import annotations

import os
from types import ModuleType

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fluffle_coordinator import rounds
from fluffle_coordinator.run_state import Quorum, Rules
from fluffle_worker import session
from tests.unit.federation_model import RUN, Identity, Message, Order, World

NAMES = "abcd"
workers = st.sampled_from(NAMES)
flaws = st.sampled_from(["", "", "", "bad", "torn"])
rules = st.builds(
    Rules,
    rounds=st.integers(1, 3),
    min_workers=st.integers(1, 3),
    quorum=st.sampled_from([Quorum(), Quorum(fraction=0.5), Quorum(number=1), Quorum(number=2)]),
    grace_s=st.sampled_from([0.0, 0.0, 3.0]),
    deadline_s=st.just(30.0),
    on_deadline=st.sampled_from(["reopen", "reopen", "close", "stop"]),
    fraction=st.sampled_from([1.0, 1.0, 0.5]),
    max_reopenings=st.integers(1, 2),
    wait_s=st.just(120.0),
)


class Federation(RuleBasedStateMachine):
    """The moves; a coordinator and its workers are there from the start, the faults come later."""

    machine: ModuleType = rounds
    worker_machine: ModuleType = session

    @initialize(rules=rules, names=st.integers(2, 4), first_weights=st.booleans())
    def found(self, rules: Rules, names: int, first_weights: bool) -> None:
        self.world = World(
            rules,
            NAMES,
            first_weights=first_weights,
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

    # --- progress, in large and in small steps ---

    @rule(steps=st.integers(1, 60))
    def let_them_work(self, steps):
        self.world.run(steps)

    @rule(seconds=st.sampled_from([0.5, 2.0, 2.0, 9.0, 15.0, 31.0]), heard=st.booleans())
    def let_time_pass(self, seconds, heard):
        self.world.now += seconds
        if heard:
            for worker in self.world.workers.values():
                worker.heartbeat()

    @rule(
        step=st.sampled_from(
            ["read_update", "read_presence", "take_event", "aggregate_one", "send_one", "tick"]
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

    # --- who comes and goes ---

    @rule()
    def coordinator_crashes(self):
        self.world.crash_coordinator()

    @rule(connected=st.booleans())
    def coordinator_starts(self, connected):
        self.world.start_coordinator()
        if connected:
            self.coordinator.connect()

    @rule(what=st.sampled_from(["connect", "lose_link", "break_off_fold"]))
    def coordinator_link(self, what):
        if self.coordinator is not None:
            getattr(self.coordinator, what)()

    @rule(name=workers, what=st.sampled_from(["begin", "begin", "crash", "leave"]))
    def worker_process(self, name, what):
        getattr(self.world.workers[name], what)()

    @rule(name=workers, what=st.sampled_from(["connect", "lose_link"]))
    def worker_link(self, name, what):
        if self.world.workers[name].alive:
            getattr(self.world.workers[name], what)()

    @rule(name=workers)
    def worker_fails(self, name):
        self.world.workers[name].finish("failed")

    # --- what a broker does to messages ---

    @rule(name=workers)
    def transient_work_is_lost(self, name):
        inbox = self.world.broker.inboxes[name]
        kept = [order for order in inbox if order.kind not in ("fit", "evaluate")]
        inbox.clear()
        inbox.extend(kept)

    @rule(name=workers)
    def old_work_comes_again(self, name):
        committed = len(self.world.disk.history)
        self.world.broker.inboxes[name].append(Order("fit", RUN, max(1, committed)))

    @rule(flaw=flaws)
    def an_update_comes_twice(self, flaw):
        updates = [m for m in self.world.broker.published if m.kind == "update"]
        if updates:
            self.world.broker.publish(Message("update", updates[-1].identity, flaw))

    @rule(name=workers, run=st.sampled_from([RUN, "run-b"]), ahead=st.integers(-2, 2), flaw=flaws)
    def a_stray_update_comes(self, name, run, ahead, flaw):
        number = max(1, len(self.world.disk.history) + 1 + ahead)
        self.world.broker.publish(Message("update", Identity(run, number, name), flaw))

    @rule()
    def signs_of_life_expire(self):
        self.world.broker.presence.clear()

    # --- what must hold ---

    @invariant()
    def holds(self):
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.settle()


PROFILE = settings(
    max_examples=60,
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
