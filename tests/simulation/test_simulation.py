"""Whole federations of simulated clients: the time that they take, and what comes out of it."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fluffle
from fluffle.federation import numbered
from fluffle.simulation.cli import simulate as simulate_command
from fluffle.simulation.devices import Device, devices
from fluffle.simulation.loop import SimulatedLoop
from fluffle.simulation.partition import Shards, dealt, each_its_own
from fluffle.simulation.simulate import clients_of, simulate_run
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint
from fluffle_common.transport.base import QueueFull
from fluffle_coordinator.machine.state import Quorum, Rules, State
from fluffle_coordinator.observe.watchers import Watcher
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.scaffold import Scaffold
from fluffle_worker.task import EvalResult, TaskOptions, TrainResult

names = functools.partial(numbered, "client")


class Adder:
    """Adds ``value`` in ``steps`` steps."""

    def __init__(self, value: float, num_examples: int = 10, size: int = 3) -> None:
        self.value, self.num_examples, self.size = value, num_examples, size

    def init(self, seed: int) -> dict[str, Any]:
        return {"w": np.zeros(self.size, np.float32)}

    def evaluate(self, weights: Mapping[str, Any]) -> EvalResult:
        return EvalResult(float(weights["w"][0]), self.num_examples, {"value": self.value})

    def train(self, weights: Mapping[str, Any], plan: Any, progress: Any) -> TrainResult:
        for step in range(4):
            progress(step + 1, 4, None)
        return TrainResult({"w": weights["w"] + np.float32(self.value)}, self.num_examples)


def one_each(options: Any) -> Adder:
    return Adder(float(options.data))


class Told(Watcher):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def record(self, event: Any) -> None:
        self.events.append(event)


@dataclass(frozen=True)
class Simulated:
    state: State
    simulated_s: float


def simulated(
    folder: Path, settings: CoordinatorSettings, clients: list[Any], watcher: Watcher
) -> Simulated:
    store, loop = RunStore(folder), SimulatedLoop()
    assert store.try_lock()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            state = runner.run(simulate_run(settings, clients, store, watcher))
    finally:
        store.unlock()
    return Simulated(state, loop.time())


def run(
    folder: Path, tasks: Mapping[str, Any], owned: list[Device] | None = None, **rules: Any
) -> tuple[Simulated, list[dict[str, Any]]]:
    settings = CoordinatorSettings("sim", Rules(**{"min_workers": len(tasks), **rules}))
    found = simulated(folder, settings, clients_of(tasks, owned), Told())
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return found, [line for line in lines if line["event"] == "committed"]


def test_the_average_is_that_of_a_federation(tmp_path):
    tasks = {name: Adder(value, n) for name, value, n in (("a", 1.0, 10), ("b", 5.0, 30))}
    found, rounds = run(tmp_path, tasks, rounds=3)
    assert found.state.outcome == "finished"
    assert [sorted(p["worker"] for p in one["participants"]) for one in rounds] == [["a", "b"]] * 3
    weights, _ = read_checkpoint(tmp_path / "round-0003.safetensors")
    np.testing.assert_array_equal(weights["w"], np.full(3, 12.0, np.float32))


def test_a_round_takes_as_long_as_its_slowest_device(tmp_path):
    tasks = {name: Adder(1.0) for name in names(3)}
    owned = [Device(fit_s=5.0, step_s=seconds / 4) for seconds in (100.0, 200.0, 400.0)]
    found, rounds = run(tmp_path, tasks, owned, rounds=4)
    assert found.state.outcome == "finished"
    assert math.isclose(found.simulated_s, 4 * 405.0, rel_tol=0.01)
    took = {p["worker"]: p["seconds"] for p in rounds[0]["participants"]}
    assert took == {"client-0": 105.0, "client-1": 205.0, "client-2": 405.0}


def test_a_quorum_waits_for_nobody_else(tmp_path):
    tasks = {name: Adder(1.0) for name in names(3)}
    owned = [Device(fit_s=seconds) for seconds in (10.0, 20.0, 4000.0)]
    found, rounds = run(tmp_path, tasks, owned, rounds=5, quorum=Quorum(number=2))
    assert [one["asked"] for one in rounds] == [list(names(3))] * 5
    assert math.isclose(found.simulated_s, 5 * 20.0, rel_tol=0.05)


def test_a_line_takes_the_time_of_its_bytes(tmp_path):
    tasks = {"a": Adder(1.0, size=250_000)}
    found, _ = run(tmp_path, tasks, [Device(bytes_per_s=1e5)], rounds=2)
    assert math.isclose(found.simulated_s, 60.0, rel_tol=0.01), "up, twice down and up, and down"


def test_what_a_strategy_sends_besides_the_model_takes_time_too(tmp_path):
    class Scaffolded(Adder):
        def __init__(self) -> None:
            super().__init__(1.0, size=250_000)
            self.local_rule = BoundRule(Scaffold())

        def train(self, weights: Mapping[str, Any], plan: Any, progress: Any) -> TrainResult:
            state = self.local_rule.begin(weights)
            self.local_rule.end(weights, state)
            return super().train(weights, plan, progress)

    settings = CoordinatorSettings(
        "sim", Rules(min_workers=1, rounds=2), strategy=load_strategy("scaffold")
    )
    clients = clients_of({"a": Scaffolded()}, [Device(bytes_per_s=1e5)])
    found = simulated(tmp_path, settings, clients, Told())
    assert math.isclose(found.simulated_s, 100.0, rel_tol=0.01), "as above, and two variates twice"


def test_a_model_in_parts_arrives(tmp_path):
    tasks = {name: Adder(1.0, size=1_500_000) for name in names(2)}
    found, rounds = run(tmp_path, tasks, rounds=2)
    assert (found.state.outcome, len(rounds)) == ("finished", 2)
    weights, _ = read_checkpoint(tmp_path / "round-0002.safetensors")
    assert np.all(weights["w"] == 2.0)


def test_hundreds_of_clients_are_sampled_as_anywhere(tmp_path):
    tasks = {name: Adder(1.0) for name in names(300)}
    _, rounds = run(tmp_path, tasks, rounds=5, fraction=0.02, seed=4)
    asked = [tuple(one["asked"]) for one in rounds]
    assert [len(one) for one in asked] == [6] * 5
    assert len(set(asked)) == 5
    _, again = run(tmp_path / "again", tasks, rounds=5, fraction=0.02, seed=4)
    assert [tuple(one["asked"]) for one in again] == asked


def test_what_ends_at_the_same_time_is_summed_in_one_order_also_in_a_continued_run(tmp_path):
    tasks, expected = [Adder(1.0) for _ in range(8)], [f"client-{number}" for number in range(8)]
    for rounds in (2, 5):
        run = fluffle.simulate(tasks, rounds=rounds, step_s=1.0, folder=tmp_path / "run")
        assert [list(one.participants) for one in run.history] == [expected] * rounds


def test_a_run_continues_where_it_stopped(tmp_path):
    tasks = {name: Adder(1.0) for name in names(2)}
    run(tmp_path, tasks, rounds=2)
    _, rounds = run(tmp_path, tasks, rounds=4)
    assert [one["round"] for one in rounds] == [1, 2, 3, 4]
    weights, _ = read_checkpoint(tmp_path / "round-0004.safetensors")
    assert np.all(weights["w"] == 4.0)


def test_a_finished_run_does_not_wait_for_clients_that_no_longer_exist(tmp_path):
    run(tmp_path, {name: Adder(1.0) for name in names(6)}, rounds=1)
    found, _ = run(tmp_path, {name: Adder(1.0) for name in names(2)}, rounds=1)
    assert found.state.reason == "1 round is done"
    assert found.simulated_s < 60


def test_a_task_that_fails_is_left_out_and_named(tmp_path):
    class Failing(Adder):
        def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
            raise ValueError("no data today")

    told = Told()
    rules = Rules(rounds=2, min_workers=3, quorum=Quorum(number=2))
    clients = clients_of({"a": Adder(1.0), "b": Failing(1.0), "c": Adder(3.0)})
    found = simulated(tmp_path, CoordinatorSettings("sim", rules), clients, told)
    assert found.state.outcome == "finished"
    reasons = [event.reason for event in told.events if event.name == "failure"]
    assert reasons
    assert all("no data today" in reason for reason in reasons)


def test_a_client_that_fails_again_ends_the_run_and_one_that_recovers_does_not():
    class Failing(Adder):
        failures = math.inf

        def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
            self.failures -= 1
            if self.failures >= 0:
                raise ValueError("no data today")
            return super().train(weights, plan, progress)

    tasks = {"north": Adder(1.0), "south": Failing(1.0)}
    said = "^the task 'south' failed again in round 1: ValueError: no data today"
    with pytest.raises(TaskError, match=said):
        fluffle.simulate(tasks, rounds=1)
    tasks["south"].failures = 1
    assert len(fluffle.simulate(tasks, rounds=1).history[0].participants) == 2


def test_a_client_that_cannot_send_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("fluffle_common.protocol.topology._UPDATES_BYTES", 1)
    with pytest.raises(QueueFull, match="queue 'sim.updates' is full"):
        run(tmp_path, {"a": Adder(1.0)}, rounds=1)


def test_a_failing_client_s_traceback_is_its_own_and_readable(capsys):
    class Failing(Adder):
        def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
            raise ValueError("no data today")

        def evaluate(self, weights: Any) -> EvalResult:
            raise ZeroDivisionError("mine")

    tasks = {"north": Adder(1.0), "south": Failing(1.0)}
    fluffle.simulate(tasks, rounds=1, quorum=1)
    stderr = capsys.readouterr().err
    assert "\\n" not in stderr
    assert stderr.count("ZeroDivisionError: mine\n") == 1
    assert stderr.count("ValueError: no data today\n") == 1
    assert stderr.count("  File ") == 2
    assert "at south, evaluate() failed, so this worker trains without evaluation" in stderr


class Letters(Adder):
    """A whole data set, of which parts are made."""

    labels = np.repeat(np.arange(4), 10)

    def __init__(self, rows: Any = None) -> None:
        super().__init__(1.0)
        self.rows = rows

    def part(self, rows: Any, sample_seed: int) -> Any:
        return Letters(rows)


def test_a_data_set_is_dealt_out():
    tasks = dealt(Letters(), Shards(1), clients=4)
    held = [set(Letters.labels[task.rows].tolist()) for task in tasks.values()]
    assert sorted(held, key=min) == [{0}, {1}, {2}, {3}]


def test_a_part_that_cannot_be_made_is_an_error_of_the_task():
    class Broken(Letters):
        def part(self, rows: Any, sample_seed: int) -> Any:
            raise ValueError("no part")

    class Empty(Letters):
        def part(self, rows: Any, sample_seed: int) -> Any:
            return None

    class Unread(Letters):
        @property
        def labels(self) -> Any:  # type: ignore[override]
            raise ValueError("no file")

    with pytest.raises(TaskError, match=r"part\(\) fails for 'client-0': ValueError: no part"):
        fluffle.simulate(Broken(), clients=4)
    with pytest.raises(UsageError, match="task 'client-0' is None, which has no method"):
        fluffle.simulate(Empty(), clients=4)
    with pytest.raises(TaskError, match="divided among the clients: ValueError: no file"):
        fluffle.simulate(Unread(), clients=4)


def test_clients_may_have_data_of_their_own():
    given: list[TaskOptions] = []
    each_its_own(lambda options: given.append(options) or Adder(1.0), "s:{client}/{clients}", 2)
    assert [(one.worker, one.data) for one in given] == [
        ("client-0", "s:0/2"),
        ("client-1", "s:1/2"),
    ]
    with pytest.raises(UsageError, match=r"--data 's:\{x\}'"):
        each_its_own(lambda _: Adder(1.0), "s:{x}", 2)


class TestDevices:
    def test_classes_are_dealt_in_turn(self):
        owned = devices(4, step_s="classes:1,2,4", fit_s="5")
        assert [one.step_s for one in owned] == [1.0, 2.0, 4.0, 1.0]
        assert {one.fit_s for one in owned} == {5.0}

    def test_the_same_seed_gives_the_same_devices(self):
        spread = "lognormal:2,0.5"
        first, second = devices(50, step_s=spread, seed=1), devices(50, step_s=spread, seed=1)
        assert first == second != devices(50, step_s=spread, seed=2)
        assert math.isclose(float(np.median([d.step_s for d in first])), 2.0, rel_tol=0.3)

    @pytest.mark.parametrize(
        "text", ["", "normal:1", "classes:", "lognormal:1", "-1", "nan", "inf"]
    )
    def test_what_is_no_spread_is_refused(self, text):
        with pytest.raises(UsageError, match="invalid distribution"):
            devices(2, step_s=text)

    def test_a_line_that_carries_nothing_is_refused(self):
        with pytest.raises(UsageError, match="more than 0 bytes per second"):
            devices(2, bytes_per_s="0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "amqp://127.0.0.1"}, "has no url=, because its broker is in memory"),
        ({"test_every": 0}, "test_every = 0 is not valid; expected a whole number of at least 1"),
        ({"clients": 0}, "clients = 0 is not valid; expected a whole number of at least 1"),
        ({"clients": "2"}, "clients = '2' is not valid; expected a whole number of at least 1"),
        ({"availability": 0.5}, "invalid availability '0.5'"),
        ({"partition": "iid"}, "partition='iid' has no effect on a list of tasks"),
        ({"strategy": "median"}, "strategy = median needs at least 3 workers, but the number of"),
        ({"fraction": 0.5, "quorum": 2}, "fraction = 0.5 needs at least 3 workers, but the number"),
        ({"federation": None}, "fluffle.simulate(): federation = None, but a value is required"),
        ({"folder": 3}, "folder = 3 is not a path"),
        ({"clients": 3}, "clients = 3, but the number of tasks is 2"),
        ({"seed": None}, "seed = None is not valid; expected a whole number of at least 0"),
        ({"owned": Device()}, "with one Device for each client, not Device(step_s=0.0, "),
        ({"owned": [1.0, 2.0]}, "one Device for each client, not [1.0, 2.0]"),
        ({"owned": [Device()]}, "there are 1 devices for 2 clients"),
        ({"availability": "often"}, "invalid availability 'often'"),
        ({"step_s": "uniform:0,1e400"}, "invalid distribution 'uniform:0,1e400'"),
    ],
)
def test_what_a_simulation_cannot_do_is_told_at_once(options, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        fluffle.simulate([Adder(1.0), Adder(2.0)], rounds=1, **options)


class Half(Adder):
    def __init__(self) -> None:
        super().__init__(0.5)


class Whole(Adder):
    """A task that can be divided."""

    labels = np.zeros(4)

    def part(self, rows: Any, sample_seed: int) -> Any:
        return Adder(1.0)


@pytest.mark.parametrize("partition", [3, Shards])
def test_what_is_no_partition_is_refused(partition):
    with pytest.raises(UsageError, match="is not a partition; use text such as dirichlet:0.5"):
        fluffle.simulate(Whole(0.0), clients=2, rounds=1, partition=partition)


@pytest.mark.parametrize("seed", [-1, 1.5, "x"])
def test_a_seed_that_is_none_is_refused_before_the_data_are_divided(seed):
    said = re.escape(f"seed = {seed!r} is not valid; expected a whole number of at least 0")
    with pytest.raises(UsageError, match=said):
        fluffle.simulate(Whole(0.0), clients=2, rounds=1, seed=seed)
    with pytest.raises(UsageError, match=said):
        fluffle.plot_partition(Whole(0.0), clients=2, seed=seed)
    with pytest.raises(
        UsageError, match="clients = 0 is not valid; expected a whole number of at least 1"
    ):
        fluffle.plot_partition(Whole(0.0), clients=0)


def test_functions_can_make_the_tasks():
    run = fluffle.simulate({"a": Half, "b": lambda: Adder(1.5)}, rounds=1)
    assert run.weights["w"].tolist() == [1.0, 1.0, 1.0]


def test_devices_may_come_from_a_generator():
    owned = (Device(fit_s=seconds) for seconds in (1.0, 7.0))
    run = fluffle.simulate([Adder(1.0), Adder(1.0)], rounds=1, owned=owned)
    assert math.isclose(run.history[0].seconds, 7.0, rel_tol=0.05)


def test_no_further_client_trains_after_ctrl_c(tmp_path):
    trained = []

    class Interrupting(Adder):
        def train(self, weights, plan, progress):
            trained.append(self.value)
            os.kill(os.getpid(), signal.SIGINT)
            return super().train(weights, plan, progress)

    store = RunStore(tmp_path)

    async def until_ctrl_c() -> State:
        rules = Rules(min_workers=9, rounds=3)
        tasks = {name: Interrupting(float(number)) for number, name in enumerate(names(9))}
        settings = CoordinatorSettings("sim", rules)
        run = asyncio.ensure_future(simulate_run(settings, clients_of(tasks), store, Told()))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, run.cancel)
        return await run

    with (
        pytest.raises(asyncio.CancelledError),
        asyncio.Runner(loop_factory=SimulatedLoop) as runner,
    ):
        runner.run(until_ctrl_c())
    store.unlock()
    assert trained == [0.0]


def test_simulated_time_stands_still_while_the_disk_is_full(tmp_path, monkeypatch):
    expected, _ = run(tmp_path / "roomy", {"a": Adder(1.0)}, rounds=1)
    slept: list[float] = []
    save = RunStore.save_weights

    def full_at_first(*args: Any, **named: Any) -> Path:
        if len(slept) < 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, **named)

    monkeypatch.setattr(RunStore, "save_weights", full_at_first)
    monkeypatch.setattr(time, "sleep", slept.append)
    found, _ = run(tmp_path / "full", {"a": Adder(1.0)}, rounds=1)
    assert slept == [5.0, 5.0]
    assert found.simulated_s == expected.simulated_s


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(UsageError, match="the names of the tasks are not unique: 1, '1'"):
        fluffle.simulate({1: Adder(1.0), "1": Adder(2.0)}, rounds=1)


def test_every_nth_model_is_tested_after_a_resumption_too(tmp_path):
    for rounds in (3, 7):
        run = fluffle.simulate(Whole(0.0), clients=2, rounds=rounds, test_every=2, folder=tmp_path)
    assert [bool(one.test) for one in run.history] == [False, True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("options", "rounds", "reason"),
    [
        ({"patience": 2}, 3, "test/loss has not improved for 2 rounds; the best is 1.0000 in rou"),
        ({"target": 1.0}, 1, "test/loss reached 1.0000 in round 1 (target 1"),
        ({"monitor": "test/value", "target": 0.0}, 1, "test/value reached 0.0000 in round 1"),
    ],
)
def test_the_test_of_a_divided_task_can_end_a_simulation(options, rounds, reason):
    run = fluffle.simulate(Whole(0.0), clients=2, rounds=9, **options)
    assert len(run.history) == rounds
    assert run.reason.replace("--", "").startswith(reason)


def test_a_metric_that_no_part_of_a_divided_task_has_is_named(capsys):
    class Parts(Whole):
        def part(self, rows: Any, sample_seed: int) -> Any:
            one = Adder(1.0)
            one.evaluate = lambda _: None
            return one

    fluffle.simulate(Parts(0.0), clients=2, rounds=3, monitor="value", progress=True)
    shown = capsys.readouterr().err
    assert "no round has the metric 'value' (monitor=), because no worker has eval" in shown
    assert shown.count("choose from test/loss, test/value\n") == 1


def test_the_last_model_is_tested_although_the_run_went_back_to_an_earlier_one(tmp_path):
    fluffle.simulate(Whole(0.0), clients=2, rounds=4, test_every=3, folder=tmp_path)
    last = tmp_path / "round-0004.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    run = fluffle.simulate(Whole(0.0), clients=2, rounds=7, test_every=3, folder=tmp_path)
    assert [bool(one.test) for one in run.history] == [False, False, True, False, False, True, True]


def test_the_file_of_a_task_may_change_the_working_directory(tmp_path):
    (tmp_path / "other").mkdir()
    leaves = f"import os; os.chdir('other'); from {__name__} import Adder\n"
    (tmp_path / "mine.py").write_text(leaves + "task = lambda _: Adder(1.0)\n")
    run = "from fluffle_common.cli.app import main; main()", "simulate", "--task", "mine.py:task"
    given = "--data", "{client}", "--clients", "2", "--rounds", "1"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", *run, *given], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "runs" / "simulation" / "round-0001.safetensors").exists()
    assert not list((tmp_path / "other").iterdir())


def test_a_simulation_never_continues_the_run_of_the_federation_in_its_file(tmp_path):
    (tmp_path / "f.toml").write_text('federation = "letters"\n')
    task = "--task", f"{__name__}:one_each", "--data", "{client}", "--clients", "2"
    run = "from fluffle_common.cli.app import main; main()", "simulate", "f.toml", "--rounds", "1"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", *run, *task], cwd=tmp_path, env=env, check=True)
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["simulation"]
    held = json.loads((tmp_path / "runs" / "simulation" / "run.json").read_text())
    assert held["federation"] == "simulation"


def test_a_task_that_cannot_be_made_leaves_no_run_folder(tmp_path):
    arguments = "--task", "fluffle:absent", "--data", "{client}", "--run", str(tmp_path / "run")
    assert isinstance(CliRunner().invoke(simulate_command, arguments).exception, UsageError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["--quorum", "5"], 5),
        (["--strategy", "krum:f=1"], 5),
        (["--quorum", "2", "--fraction", "0.3"], 4),
    ],
)
def test_too_few_clients_for_a_round_are_refused_at_once(tmp_path, options, needed):
    arguments = ["--task", f"{__file__}:one_each", "--data", "{client}", "--clients", "3", *options]
    with pytest.raises(UsageError, match=f"round needs at least {needed} clients; give --clients"):
        CliRunner().invoke(
            simulate_command, [*arguments, "--run", str(tmp_path / "run")], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())


def test_a_partition_of_clients_with_tasks_of_their_own_is_refused():
    arguments = ["--task", f"{__file__}:one_each", "--data", "{client}", "--partition", "shards:2"]
    with pytest.raises(UsageError, match="--partition shards:2 has no effect, because {client} in"):
        CliRunner().invoke(simulate_command, arguments, catch_exceptions=False)
