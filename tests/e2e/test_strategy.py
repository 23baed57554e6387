"""A strategy from a user's own file, in real processes: killed, resumed, replayed, and broken."""

import shutil
import signal

import numpy as np
import pytest

from fluffle_common.tensors.checkpoint import read_checkpoint, read_whole
from tests import here
from tests.e2e.programs import ROOT, Federation
from tests.federation.test_extra import STEPS, TARGETS, reference

pytestmark = pytest.mark.rabbit
ROUNDS = 60


def test_a_stateful_strategy_outlives_its_coordinator_and_is_replayed(
    federation: Federation,
) -> None:
    shutil.copy(ROOT / "tests/federation/momentum.py", federation.folder / "mine.py")
    flags = ("--quorum", 2, "--rounds", ROUNDS, "--keep-updates", "--strategy")
    first = federation.coordinator(*flags, "mine.py:momentum")
    workers = [federation.worker(f"shard:{n}/2") for n in range(2)]
    first.wait_for("round 2: committed")
    first.send(signal.SIGKILL)
    first.end()

    other = federation.coordinator("--quorum", 2, "--strategy", "fedavg")
    assert other.end() == 2
    told = other.lines[-1]
    assert "used the strategy mine.py:momentum up to round" in told
    assert "this command names fedavg; give --strategy mine.py:momentum" in told

    second = federation.coordinator(*flags, "mine.py:momentum")
    assert [program.end() for program in (second, *workers)] == [0, 0, 0]
    for number in (1, 2, ROUNDS):
        found = read_whole(federation.run / f"round-{number:04d}.safetensors")
        assert found.strategy_state.keys() == found.weights.keys()
        code, told, errors = here.fluffle("replay", federation.run, "--round", number)
        assert code == 2, told + errors
        given = f"{federation.folder / 'mine.py'}:momentum"
        assert f"give --strategy {given}" in errors
        flags = ("--round", number, "--strategy", given)
        code, told, errors = here.fluffle("replay", federation.run, *flags)
        assert code == 0, told + errors


def test_a_strategy_that_fails_ends_the_coordinator_with_its_line_and_loses_nothing(
    federation: Federation,
) -> None:
    source = (ROOT / "tests/federation/momentum.py").read_text()
    mine = federation.folder / "mine.py"
    mine.write_text(source.replace("moved = {", "moved = 1 / 0\n        moved = {"))
    flags = ("--quorum", 2, "--rounds", 1, "--strategy", "mine.py:momentum")
    coordinator = federation.coordinator(*flags)
    workers = [federation.worker(f"shard:{n}/2") for n in range(2)]
    assert coordinator.end() == 5
    told = "\n".join(coordinator.lines)
    assert "Traceback" in told
    assert coordinator.lines[-1].startswith(
        "fluffle: the strategy mine.py:momentum failed in round 1, in finish(): ZeroDivisionError"
    )
    assert not (federation.run / "history.jsonl").exists()

    mine.write_text(source)
    again = federation.coordinator(*flags)
    assert [program.end() for program in (again, *workers)] == [0, 0, 0]


def test_a_strategy_and_its_local_rule_outlive_the_coordinator_and_the_workers(
    federation: Federation,
) -> None:
    shutil.copy(ROOT / "tests/federation/scaffold.py", federation.folder / "mine.py")
    flags = ("--quorum", 2, "--strategy", "mine.py:scaffold", "--rounds")
    task = f"{ROOT / 'tests/e2e/descent_task.py'}:task"

    def everybody(rounds: int) -> None:
        programs = [federation.coordinator(*flags, rounds)]
        for name, target in TARGETS.items():
            rule = ("--id", name, "--local-rule", "mine.py:controlled")
            programs.append(federation.worker(f"{target}/{STEPS[name]}", *rule, task=task))
        assert [program.end() for program in programs] == [0, 0, 0]

    everybody(3)
    everybody(6)
    for number, expected in enumerate(reference(6), start=1):
        weights, _ = read_checkpoint(federation.run / f"round-{number:04d}.safetensors")
        np.testing.assert_allclose(weights["w"], expected, rtol=1e-5)
    kept = federation.folder / "runs/workers" / federation.name / "a"
    assert (kept / "local-rule-0006.safetensors").exists()
