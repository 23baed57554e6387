"""Silence is judged fairly: living workers are waited for, and dead ones count as gone.

Heartbeats are short here, so a stop of 3 s corresponds to half a minute with the defaults. An alarm
of the broker is in ``test_own_broker``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.faults.fast_task import first_weights
from tests.faults.harness import Federation, Program
from tests.faults.test_recovery import assert_ended_well

pytestmark = pytest.mark.rabbit

WORKERS, ROUNDS = 3, 3
BEAT = ("--heartbeat", 0.2)
FIVE_BEATS_S = 1.0
FLAGS = ("--min-workers", WORKERS, "--quorum", "all", "--rounds", ROUNDS)


@contextlib.contextmanager
def two_of_three_have_answered(federation: Federation) -> Iterator[Program]:
    """Start all; yield while the third worker trains, then check that it is counted too."""
    hold = federation.folder / "hold"
    hold.touch()
    coordinator = federation.coordinator(*FLAGS)
    workers = [
        federation.worker(0, WORKERS, *BEAT, FAULTS_HOLD=str(hold)),
        *(federation.worker(number, WORKERS, *BEAT) for number in (1, 2)),
    ]
    coordinator.wait_for("counted", round=1, updates=2)
    yield coordinator
    threading.Event().wait(FIVE_BEATS_S / 2)
    hold.unlink()
    assert_everybody_was_counted(federation, coordinator, *workers)


def assert_everybody_was_counted(federation: Federation, *programs: Program) -> None:
    assert [program.end() for program in programs] == [0] * len(programs)
    counted = {
        line["round"]: sorted(one["worker"] for one in line["participants"])
        for line in federation.history("committed")
    }
    assert counted == {number: ["w0", "w1", "w2"] for number in range(1, ROUNDS + 1)}
    assert_ended_well(federation)


def test_a_stopped_coordinator_waits_for_all_living_workers(
    federation: Federation,
) -> None:
    with two_of_three_have_answered(federation) as coordinator:
        with federation.stopped(coordinator):
            threading.Event().wait(3 * FIVE_BEATS_S)


def test_old_heartbeats_of_killed_workers_open_no_round(
    federation: Federation, tmp_path: Path
) -> None:
    model = tmp_path / "first.safetensors"  # so that no worker is asked for first weights
    save_file(first_weights(seed=0), model)

    before = federation.coordinator("--min-workers", WORKERS + 1)
    workers = [federation.worker(number, WORKERS, *BEAT) for number in range(WORKERS)]
    for number in range(WORKERS):
        before.wait_for("joined", worker=f"w{number}")
    before.kill()
    threading.Event().wait(2 * FIVE_BEATS_S)  # their messages now wait for the next coordinator
    for dead in workers[1:]:
        dead.kill()
    threading.Event().wait(2 * FIVE_BEATS_S)

    fresh = federation.coordinator("--fresh", "--init", model, *FLAGS)
    fresh.wait_for("joined", worker="w0")
    threading.Event().wait(2 * FIVE_BEATS_S)
    assert fresh.events("opened") == []
    workers[1:] = [federation.worker(number, WORKERS, *BEAT) for number in (1, 2)]
    assert_everybody_was_counted(federation, fresh, *workers)
