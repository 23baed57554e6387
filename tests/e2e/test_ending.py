"""How a worker's process ends, whatever its task is at."""

import signal

import pytest

from tests.e2e.programs import ROOT, Federation
from tests.processes import press_ctrl_c_until_it_ends, wait_until_computed

pytestmark = pytest.mark.rabbit
STUBBORN = f"{ROOT / 'tests/e2e/stubborn_task.py'}:task"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["blas", "hash", "sleep"])
def test_a_step_in_c_code_puts_off_no_end(federation: Federation, mode, number) -> None:
    coordinator = federation.coordinator("--quorum", 1)
    worker = federation.worker(f"{mode}:w", task=STUBBORN)
    worker.wait_for("round 1: training")
    worker.send(number)
    assert worker.end() == 128 + number  # the step takes longer than this waits
    assert worker.lines[-1].endswith("left the federation; run the same command to join again")
    coordinator.wait_for(r"left \(stopped by its owner\)")


def test_a_second_ctrl_c_ends_whoever_holds_the_gil(federation: Federation) -> None:
    federation.coordinator("--quorum", 1)
    worker = federation.worker("gil:w", task=STUBBORN)
    worker.wait_for("round 1: training")
    wait_until_computed(worker.process.pid, 1.0)  # so it holds the GIL
    assert press_ctrl_c_until_it_ends(worker.process) == -signal.SIGINT


def test_the_end_of_a_task_s_children_is_theirs_alone(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 3)
    workers = [federation.worker(f"fork:{name}", task=STUBBORN) for name in "ab"]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]


def test_a_task_that_always_fails_is_no_success(federation: Federation) -> None:
    # Within the grace, every round waits for both answers.
    rules = ("--quorum", 1, "--min-workers", 2, "--grace", 300)
    coordinator = federation.coordinator(*rules, "--rounds", 2)
    fails = federation.worker("fails:a", task=STUBBORN)
    fine = federation.worker("ok:b", task=STUBBORN)
    assert [program.end() for program in (coordinator, fails, fine)] == [0, 5, 0]
    (told,) = [line for line in fails.lines if line.startswith("fluffle: ")]
    assert "failed in every round: ValueError: it does (stubborn_ta" in told
    assert len([line for line in fails.lines if line.startswith("Traceback")]) == 1


def test_a_run_that_stopped_is_no_success(federation: Federation) -> None:
    coordinator = federation.coordinator(
        "--quorum", 2, "--min-workers", 2, "--deadline", 1, "--on-deadline", "stop"
    )
    hangs = federation.worker("sleep:a", task=STUBBORN)
    fine = federation.worker("ok:b", task=STUBBORN)
    assert [program.end() for program in (coordinator, hangs, fine)] == [4, 4, 4]
    (told,) = [line for line in fine.lines if line.startswith("fluffle: ")]
    assert "the run stopped before its end" in told
    assert "start this worker again with the same command" in told
