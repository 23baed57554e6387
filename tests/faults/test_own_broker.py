"""Recovery from what happens to a whole broker: it is killed, impatient or out of memory.

``FULL=1`` in the environment uses the longer times and larger numbers of docs/guarantees.md.
"""

from __future__ import annotations

import re
import threading

import pytest

from tests.faults.alarm import memory_alarm
from tests.faults.conftest import OwnBroker
from tests.faults.harness import Federation, wait_until
from tests.faults.test_recovery import FULL, assert_ended_well, hold_from, start
from tests.faults.test_silence import FIVE_BEATS_S, two_of_three_have_answered

pytestmark = pytest.mark.rabbit


def test_a_broker_killed_in_the_middle_of_a_round(
    own_broker: OwnBroker, own_federation: Federation
) -> None:
    federation = own_federation
    hold = federation.folder / "hold"
    hold_from(hold, 2)
    coordinator, workers = start(federation, 3, "--rounds", 4, "--config", "train_s=1", hold=hold)
    for worker in workers:
        worker.wait_for("begin", round=2)
    own_broker.kill()
    for program in (coordinator, *workers):
        program.wait_for("no_broker")
    threading.Event().wait(10 if FULL else 3)
    own_broker.start()
    hold.unlink()
    assert_ended_well(federation, coordinator, *workers)
    # No process was restarted.
    assert all(len(program.events("loaded")) == 1 for program in workers)


def test_a_round_longer_than_the_brokers_patience(
    own_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = own_federation
    monkeypatch.setenv("FLUFFLE_QUEUE_TYPE", "quorum")  # RabbitMQ 4.3 has no timeout for others
    hold = federation.folder / "hold"
    hold_from(hold, 1)
    coordinator, workers = start(federation, 3, "--rounds", 1, "--config", "train_s=0.2", hold=hold)
    # The broker takes the unacknowledged updates back, more than once.
    for times in range(1, 6 if FULL else 3):
        wait_until(
            lambda times=times: len(coordinator.events("disconnected")) >= times,
            f"the coordinator is disconnected {times} times",
        )
    reasons = {event["reason"] for event in coordinator.events("disconnected")}
    assert all(re.search("acknowledge.*time", reason) for reason in reasons), reasons
    hold.unlink()
    assert_ended_well(federation, coordinator, *workers)


def test_a_memory_alarm_makes_no_worker_gone(
    own_broker: OwnBroker, own_federation: Federation
) -> None:
    with (
        own_broker.patient(),
        two_of_three_have_answered(own_federation),
        own_federation.unheard("alarm"),
        memory_alarm(own_broker.info),
    ):
        threading.Event().wait(3 * FIVE_BEATS_S)
