"""The benchmarks' statistics, gates, logs and simulated workers."""

import doctest
import json
import sys
import threading
import time

import numpy as np
import pytest

from benchmarks import command, flower, flower_simulation, papers, stats
from benchmarks.aggregate import axpy
from benchmarks.arrays import Perturbation, make_weights
from benchmarks.comparison import compare
from benchmarks.compression import Federation
from benchmarks.floor import Spec
from benchmarks.logs import read_events
from benchmarks.processes import Died
from benchmarks.round_gate import Gate, Gates
from benchmarks.simulated_jobs import JOBS
from fluffle_common.cli.console import Console
from fluffle_common.protocol.messages import Compression, Plan
from fluffle_worker.task import RoundPlan
from tests.federation.pull_task import COUNT, Pull, target


@pytest.mark.parametrize("module", [command, flower_simulation, papers, stats])
def test_the_examples_do_what_they_say(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_ratio_is_median_over_median():
    assert stats.ratio([4.0, 1.0, 100.0], [2.0, 0.1, 2.0]) == 2.0


def test_summary_of_a_single_time_has_quartiles_too():
    assert stats.summary([0.5]) == {
        "median_s": 0.5,
        "mean_s": 0.5,
        "quartiles_s": [0.5, 0.5],
        "times_s": [0.5],
    }


@pytest.mark.parametrize(("rounds", "blocks"), [(1, 1), (7, 3), (10, 5), (3, 9)])
def test_shares_are_even_and_none_is_empty(rounds, blocks):
    shares = stats.shares(rounds, blocks)
    assert sum(shares) == rounds
    assert len(shares) == min(rounds, blocks)
    assert 0 < min(shares) <= max(shares) <= min(shares) + 1


def test_the_order_turns_around_after_every_block():
    order = [side for side, _ in stats.interleaved(["a", "b", "c"], [1, 1, 1])]
    assert order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_growth_compares_the_ends():
    assert stats.growth([3, 10, 30], [1.0, 99.0, 20.0]) == 2.0


class Scripted:
    """A side whose rounds take a given time."""

    def __init__(self, name, seconds):
        self.name, self.seconds, self.asked = name, seconds, []

    def block(self, rounds):
        """Return the given time for each round."""
        self.asked.append(rounds)
        return [self.seconds] * rounds

    def pids(self):
        """Return no processes."""
        return {}

    def more(self):
        """Return the side's name."""
        return {"name": self.name}


def test_every_side_runs_every_block():
    slow, quick = Scripted("slow", 2.0), Scripted("quick", 1.0)
    found = compare([slow, quick], [3, 2])
    assert slow.asked == quick.asked == [3, 2]
    assert found["slow"].blocks == [[2.0, 2.0, 2.0], [2.0, 2.0]]
    assert found["quick"].as_dict()["median_s"] == 1.0
    assert found["quick"].as_dict()["name"] == "quick"


@pytest.mark.parametrize("size_bytes", [4, 100_000, 1_359_784, 10_000_000])
def test_weights_have_the_size_asked_for(size_bytes):
    weights = make_weights(size_bytes)
    assert sum(tensor.nbytes for tensor in weights.values()) == size_bytes
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}


def test_every_perturbation_is_another_one():
    weights = make_weights(100_000)
    perturb = Perturbation(1)
    first = {name: tensor.copy() for name, tensor in perturb(weights).items()}
    second = perturb(weights)
    for name, tensor in weights.items():
        assert np.mean(first[name] == tensor) < 0.01
        assert np.mean(first[name] == second[name]) < 0.01


def test_plain_axpy_adds_up():
    weights = make_weights(1_000_000)
    totals = {name: np.zeros(tensor.shape) for name, tensor in weights.items()}
    axpy(totals, weights, 3)
    axpy(totals, weights, 4)
    for name, tensor in weights.items():
        np.testing.assert_allclose(totals[name], 7.0 * tensor.astype(np.float64), rtol=1e-12)


def test_the_floor_sends_as_many_bytes_in_as_many_parts():
    spec = Spec("amqp://", 3, size_bytes=10, part_bytes=4)
    bodies = spec.bodies()
    assert [len(body) for body in bodies] == [4, 4, 2]
    assert spec.parts == len(bodies)


def test_parts_are_transient_and_whole_answers_durable():
    assert Spec("amqp://", 3, size_bytes=4, part_bytes=4).answer_mode == 2
    assert Spec("amqp://", 3, size_bytes=5, part_bytes=4).answer_mode == 1
    assert Spec("amqp://", 3, size_bytes=5, part_bytes=4, durable_parts=True).answer_mode == 2


def test_a_gate_lets_through_as_often_as_it_was_told(tmp_path):
    gates = Gates(tmp_path / "gate", 1, check=lambda: None)
    entered = []

    def worker():
        gate = Gate(str(tmp_path / "gate"))
        with pytest.raises(ConnectionError):
            while True:
                gate.enter()
                entered.append(len(entered))
        gate.close()

    thread = threading.Thread(target=worker)
    thread.start()
    gates.wait()
    assert entered == []
    gates.release(3)
    gates.wait()
    assert entered == [0, 1, 2]
    gates.close()
    thread.join()


def test_waiting_at_the_gates_ends_when_a_worker_has_died(tmp_path):
    def check():
        raise Died("w1 ended")

    gates = Gates(tmp_path / "gate", 1, check)
    gate = Gate(str(tmp_path / "gate"))
    with pytest.raises(Died):
        gates.wait()
    gate.close()
    gates.close()


def test_what_a_program_tells_is_read_back_with_its_time(tmp_path):
    log = tmp_path / "log"
    before = time.time()
    with log.open("w") as stream, Console("json", {}, stream) as console:
        for event in ("opened", "committed"):
            console.line(event, str)
    after = time.time()
    with log.open("a") as stream:
        stream.write('a warning\n{"eve')  # and the beginning of a line
    events, offset = read_events(log, 0)
    assert [event["event"] for _, event in events] == ["opened", "committed"]
    assert before - 1e-6 <= events[0][0] <= events[1][0] <= after
    assert read_events(log, offset) == ([], offset)


@pytest.mark.parametrize(("how", "part"), [("none", 1), ("bf16", 0.5), ("int8", 0.26)])
def test_a_simulated_federation_learns_in_as_many_bytes_as_its_encoding_takes(how, part):
    plan = Plan(compress=None if how == "none" else Compression.parse(how))
    federation = Federation([Pull(1), Pull(2)], plan)
    nbytes = [federation.round(number) for number in range(1, 9)]
    assert max(nbytes) <= part * 4 * COUNT
    off = federation.weights["w"] - (target(1) + target(2)) / 2
    assert np.abs(off).max() < 0.05


class Untrained:
    """A task that records the number of epochs of each training."""

    num_examples = 7

    def __init__(self):
        self.epochs = []

    def train(self, weights, plan, progress):
        """Record the number of epochs."""
        self.epochs.append(plan.epochs)


def test_random_epochs_are_two_to_five_and_the_same_for_both_strategies():
    first, second = Untrained(), Untrained()
    for task in (first, second):
        wrapped = papers.RandomEpochs(task, seed=3)
        assert wrapped.num_examples == 7
        for number in range(1, 101):
            wrapped.train({}, RoundPlan(epochs=1, round=number), lambda *_: None)
    assert set(first.epochs) == {2, 3, 4, 5}
    assert first.epochs == second.epochs


def test_a_ratio_of_rounds_needs_both_partitions_to_reach_the_target():
    iid, shards = {0.1: [20, 40], 0.2: [50, 50]}, {0.1: [90, 90], 0.2: [10, None]}
    found = papers.compared({"iid": iid, "shards:2": shards})
    assert found["iid"] == {"learning_rate": 0.1, "rounds": 30.0}
    assert found["ratio"] == 3.0
    assert papers.compared({"iid": iid, "shards:2": {0.1: [None, 5]}})["ratio"] is None


def test_both_engines_get_the_same_simulated_job(tmp_path):
    options = flower.parser().parse_args(["--simulation", "--job", "lr", "--num-cpus", "0.5"])
    ours, _ = flower_simulation.command_of("fluffle", options, "lr", tmp_path)
    theirs, env = flower_simulation.command_of("flower", options, "lr", tmp_path)
    assert ours[0] == sys.executable
    assert ours[2:] == ["benchmarks.simulation", "--job", "lr", "--rounds", "100", "--json"]
    assert theirs[0] == str(flower.PYTHON)
    config = json.loads(theirs[-1])
    assert (config["job"], config["rounds"], config["num_cpus"]) == ("lr", 100, 0.5)
    assert env["FLWR_TELEMETRY_ENABLED"] == env["RAY_USAGE_STATS_ENABLED"] == "0"


def test_all_simulated_jobs_run_unless_some_are_named():
    assert flower.parser().parse_args([]).job == list(JOBS)
    assert flower.parser().parse_args(["--job", "noop", "lr"]).job == ["noop", "lr"]
    with pytest.raises(SystemExit):
        flower.parser().parse_args(["--job", "letters"])


def test_a_job_that_fails_shows_what_it_wrote():
    command_line = [sys.executable, "-c", "raise SystemExit('no ray here')"]
    with pytest.raises(Died, match="no ray here"):
        flower_simulation.timed(command_line, {})


def test_every_simulated_client_has_a_task():
    assert len(JOBS["noop"].tasks()) == JOBS["noop"].clients
    assert JOBS["lr"].fraction * JOBS["lr"].clients == 10
