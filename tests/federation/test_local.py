"""``fluffle.run``: whole federations in this process, in real time."""

from __future__ import annotations

import asyncio
import copy
import errno
import fcntl
import gc
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fluffle
from fluffle.keywords import as_keywords
from fluffle.progress import Progress
from fluffle_common.protocol.events import Blocked, Evaluated, NoBroker
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.checkpoint import save_checkpoint
from fluffle_coordinator.machine import machine
from fluffle_coordinator.machine.state import Phase, Rules
from fluffle_coordinator.service import committer
from fluffle_coordinator.storage import history
from fluffle_coordinator.storage.run_store import RunStore

ROOT = Path(__file__).parents[2]


class Adder:
    """Adds 1 to its weights, a step at a time."""

    num_examples = 10

    def __init__(self, *, steps: int = 1, step_s: float = 0.0):
        self.steps, self.step_s = steps, step_s
        self.trained = 0

    def init(self, seed):
        return {"w": np.full(2, float(seed))}

    def train(self, weights, plan, progress):
        for step in range(self.steps):
            progress(step + 1, self.steps, 1.0)
            time.sleep(self.step_s)
        self.trained += 1
        return fluffle.TrainResult({"w": weights["w"] + 1}, self.num_examples, {"loss": 0.5})

    def evaluate(self, weights):
        return fluffle.EvalResult(float(weights["w"].max()), 5, {"accuracy": 0.5})


class Softmax:
    """Softmax regression on handwritten digits, in float64, by stochastic gradient descent."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.num_examples = inputs, targets, len(inputs)

    def init(self, seed):
        rng = np.random.default_rng(seed)
        return {"w": rng.normal(0, 0.01, (64, 10)), "b": np.zeros(10)}

    def train(self, weights, plan, progress):
        w, b = weights["w"].copy(), weights["b"].copy()
        rng = np.random.default_rng(plan.seed)
        for _ in range(plan.epochs):
            order = rng.permutation(self.num_examples)
            for start in range(0, len(order), plan.batch_size):
                batch = order[start : start + plan.batch_size]
                error = self._errors(w, b, batch)
                w -= plan.learning_rate * self.inputs[batch].T @ error / len(batch)
                b -= plan.learning_rate * error.mean(axis=0)
                progress(start, len(order), None)
        return fluffle.TrainResult({"w": w, "b": b}, self.num_examples)

    def evaluate(self, weights):
        right = self.accuracy(weights)
        return fluffle.EvalResult(1 - right, self.num_examples, {"accuracy": right})

    def accuracy(self, weights):
        predicted = (self.inputs @ weights["w"] + weights["b"]).argmax(axis=1)
        return float((predicted == self.targets).mean())

    def _errors(self, w, b, batch):
        logits = self.inputs[batch] @ w + b
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        raised /= raised.sum(axis=1, keepdims=True)
        raised[np.arange(len(batch)), self.targets[batch]] -= 1
        return raised


@pytest.fixture(scope="module")
def digits():
    """Three owners of different size, each with more of some digits than of others."""
    data = load_digits()
    order = np.argsort(data.target[:1500], kind="stable")
    inputs, targets = data.data[:1500][order] / 16, data.target[:1500][order]
    return {
        name: Softmax(inputs[start::3][:size], targets[start::3][:size])
        for name, start, size in (("north", 0, 500), ("south", 1, 300), ("west", 2, 407))
    }


def federated_averaging(tasks, orders, seed, **plan):
    """Return what plain NumPy makes of the rounds, in float64.

    ``orders`` names the tasks of each round, in the order in which their updates are added.
    """
    weights = next(iter(tasks.values())).init(seed)
    total = sum(task.num_examples for task in tasks.values())
    for number, order in enumerate(orders, start=1):
        of_round = Plan(seed=(seed * 1_000_003 + number) % 2**63, **plan)
        trained = [
            (tasks[name].num_examples, tasks[name].train(weights, of_round, lambda *_: None))
            for name in order
        ]
        averaged = {}
        for name, old in weights.items():
            moved = np.zeros_like(old)
            for count, result in trained:
                moved += count * (result.weights[name] - old)
            averaged[name] = moved / total + old
        weights = averaged
    return weights


def test_a_run_matches_numpy_bit_for_bit(digits):
    plan = {"epochs": 2, "batch_size": 20, "learning_rate": 0.1}
    run = fluffle.run(digits, rounds=4, seed=7, **plan)
    expected = federated_averaging(digits, [list(digits)] * 4, 7, **plan)
    assert [list(one.participants) for one in run.history] == [list(digits)] * 4
    for name, tensor in expected.items():
        assert run.weights[name].tobytes() == tensor.tobytes(), name
    assert run.history[-1].participants == {"north": 500, "south": 300, "west": 407}
    accuracy = run.history["accuracy"]
    assert accuracy[-1] > max(0.85, accuracy[0])
    assert run.best.number == 1 + int(np.argmin(run.history["loss"]))


class Silent(Adder):
    """Does not evaluate, so its answers take less time to send."""

    def evaluate(self, weights):
        return None


def test_updates_are_summed_in_the_order_of_the_names_also_in_a_continued_run(tmp_path):
    tasks = {name: Silent() if name in "bd" else Adder() for name in "fedcba"}
    for rounds in (3, 5, 6):
        run = fluffle.run(tasks, rounds=rounds, folder=tmp_path / "run")
        assert [list(one.participants) for one in run.history] == [list("abcdef")] * rounds


def test_a_task_gets_its_tensors_in_its_own_order_also_in_a_continued_run(tmp_path):
    class Ordered(Adder):
        def init(self, seed):
            return {"z": np.zeros(2, np.float16), "b": np.zeros(2), "k": np.zeros(2, np.float32)}

        def train(self, weights, plan, progress):
            orders.append("".join(weights))
            return fluffle.TrainResult({n: w + 1 for n, w in weights.items()}, self.num_examples)

        def evaluate(self, weights):
            return None

    orders = []
    options = {"strategy": "fedadam", "folder": tmp_path / "run"}
    for rounds in (2, 4):
        run = fluffle.run([Ordered()], rounds=rounds, **options)
    assert orders == ["zbk"] * 4
    assert "".join(run.weights) == "zbk"


def test_a_run_is_shown_as_text_and_as_a_table():
    run = fluffle.run(
        {"north": Adder()}, rounds=2, evaluate=lambda weights: {"<w>": weights["w"][0]}
    )
    assert run.reason == "2 rounds are done"
    assert str(run).splitlines() == [
        f"Run {run.id}: 2 rounds in {run.folder}; 2 rounds are done",
        "round  workers  examples  train_loss    loss  accuracy  test/<w>",
        "    1        1        10      0.5000  1.0000    0.5000    1.0000",
        "    2        1        10      0.5000  2.0000    0.5000    2.0000",
    ]
    assert repr(run.best) == (
        "Round 1: 1 worker, 10 examples, train_loss 0.5000, loss 1.0000, accuracy 0.5000, "
        "test/<w> 1.0000"
    )
    page = run._repr_html_()
    assert "<th>test/&lt;w&gt;</th>" in page
    assert page.count("<tr>") == 3


def test_text_of_others_cannot_change_the_terminal():
    run = fluffle.run(
        [Adder()], rounds=2, evaluate=lambda _: {"a\nb\x1b[2J": 1}, on_round=lambda _: "e\n\x1b[1m"
    )
    first, names, *_ = str(run).splitlines()
    assert first.endswith(r"; e \x1b[1m")
    assert names.endswith(r"  test/a b\x1b[2J")
    assert run.reason == "e\n\x1b[1m"


def test_a_figure_has_every_column(tmp_path):
    run = fluffle.run([Adder()], rounds=2, evaluate=lambda _: {"loss": 1.0, "f1": 0.5})
    figure = run.plot(tmp_path / "run.png")
    drawn = [[line.get_label() for line in axes.lines] for axes in figure.axes]
    assert drawn == [["train_loss", "loss", "test/loss"], ["accuracy", "test/f1"]]
    assert {name for panel in drawn for name in panel} == set(run.history.columns)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [r"$\bad{$", "_private"])
def test_a_figure_shows_the_name_of_any_metric(name, tmp_path):
    class Odd(Adder):
        def evaluate(self, weights):
            return fluffle.EvalResult(1.0, 5, {name: 0.5})

    figure = fluffle.run([Odd()], rounds=1).plot(tmp_path / "run.png")
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == [name]


def test_the_best_model_can_be_read_although_its_checkpoint_is_removed():
    run = fluffle.run([Adder()], rounds=4, keep_checkpoints=2, monitor="loss")
    assert not run.best.checkpoint.exists()
    first = run.history[-1].weights["w"] - 3
    np.testing.assert_array_equal(run.best.weights["w"], first)
    with pytest.raises(fluffle.UsageError, match=r"no model file .*round-0002"):
        _ = run.history[1].weights


def test_a_figure_needs_matplotlib_and_something_to_draw(monkeypatch):
    class Silent(Adder):
        def train(self, weights, plan, progress):
            return fluffle.TrainResult(weights, self.num_examples)

        def evaluate(self, weights):
            return None

    run = fluffle.run([Silent()], rounds=1)
    with pytest.raises(fluffle.UsageError, match="no task has reported one yet"):
        run.plot()
    assert (run.best, run.history.columns) == (run.history[-1], ())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fluffle.UsageError, match=r"pip install 'fluffle\[plot\]'"):
        fluffle.run([Adder()], rounds=1).plot()


def test_a_temporary_folder_goes_with_its_run(tmp_path):
    run = fluffle.run([Adder()], rounds=1)
    folder = run.folder
    assert (folder / "round-0001.safetensors").exists()
    del run
    assert not folder.exists()


@pytest.mark.parametrize(
    "part",
    [
        lambda run: run.history[-1],
        lambda run: run.history[1:][0],
        lambda run: run.history.best("loss"),
        lambda run: run.best,
        copy.copy,
        copy.deepcopy,
    ],
)
def test_a_temporary_folder_stays_as_long_as_a_part_or_a_copy_of_its_run(part):
    kept = part(fluffle.run([Adder()], rounds=2))
    folder = kept.folder if isinstance(kept, fluffle.Run) else kept.checkpoint.parent
    assert kept.weights["w"][0] in {1.0, 2.0}
    assert pickle.loads(pickle.dumps(kept)).weights["w"][0] == kept.weights["w"][0]
    assert folder.exists()  # the unpickled one did not take it along
    del kept
    assert not folder.exists()


def test_a_run_folder_is_kept_resumed_and_opened(tmp_path):
    folder = tmp_path / "run"
    task = Adder()
    fluffle.run([task], rounds=2, folder=folder)
    run = fluffle.run([task], rounds=3, folder=folder)
    assert task.trained == 3
    assert run.weights["w"].tolist() == [3.0, 3.0]
    assert fluffle.run([task], rounds=3, folder=folder).history == run.history
    assert task.trained == 3
    again = fluffle.Run(folder)
    assert again.history == run.history
    assert again.id == run.id
    fresh = fluffle.run([task], rounds=1, folder=folder, fresh=True)
    assert fresh.weights["w"].tolist() == [1.0, 1.0]
    assert (tmp_path / "run.1").is_dir()


def test_a_resumed_run_does_not_keep_the_model_that_it_read(tmp_path, monkeypatch):
    read, kept = [], []
    load = RunStore.load

    def load_and_watch(store, federation):
        saved = load(store, federation)
        read.append(weakref.ref(saved))
        return saved

    monkeypatch.setattr(RunStore, "load", load_and_watch)
    fluffle.run([Adder()], rounds=1, folder=tmp_path)
    fluffle.run([Adder()], rounds=2, folder=tmp_path, on_round=lambda _: kept.append(read[1]()))
    assert kept == [None]


def test_a_resumed_run_reads_its_history_once(tmp_path, monkeypatch):
    fluffle.run([Adder()], rounds=1, folder=tmp_path)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    checked, read = [], []
    monkeypatch.setattr(history, "check_line", checked.append)
    fluffle.run([Adder()], rounds=2, folder=tmp_path, on_round=lambda _: read.extend(checked))
    assert read == list(map(json.loads, lines))


async def test_it_runs_in_a_notebook_with_a_running_event_loop():
    run = fluffle.run([Adder(), Adder()], rounds=2)
    assert run.weights["w"].tolist() == [2.0, 2.0]


async def test_the_callers_event_loop_keeps_running():
    inside = asyncio.Event()
    loop = asyncio.get_running_loop()
    go_on = threading.Event()

    def on_round(commit):
        loop.call_soon_threadsafe(inside.set)
        assert go_on.wait(60)

    running = asyncio.create_task(fluffle.arun([Adder()], rounds=1, on_round=on_round))
    await inside.wait()  # which needs this loop, while the run waits for us
    go_on.set()
    assert (await running).weights["w"].tolist() == [1.0, 1.0]


async def test_the_callers_event_loop_keeps_running_while_the_tasks_are_made():
    loop, go_on = asyncio.get_running_loop(), threading.Event()

    def task():
        loop.call_soon_threadsafe(go_on.set)
        assert go_on.wait(20)
        return Adder()

    assert (await fluffle.arun([task], rounds=1)).weights["w"].tolist() == [1.0, 1.0]


async def test_a_run_that_is_cancelled_while_its_tasks_are_made_does_not_begin(tmp_path):
    loop, making, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def task():
        loop.call_soon_threadsafe(making.set)
        assert go_on.wait(20)
        return Adder()

    running = asyncio.create_task(fluffle.arun([task], rounds=1, folder=tmp_path / "run"))
    await making.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go_on.set()
    await loop.shutdown_default_executor()  # until the task is made
    assert not (tmp_path / "run").exists()


async def test_cancelling_stops_the_run_and_the_same_call_resumes_it(tmp_path):
    third = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_round(commit):
        if commit.round == 3:
            loop.call_soon_threadsafe(third.set)

    task = Adder(steps=100, step_s=0.001)
    arguments = {"rounds": 1000, "folder": tmp_path, "on_round": on_round}
    running = asyncio.create_task(fluffle.arun([task], **arguments))
    await third.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    committed = len(fluffle.Run(tmp_path).history)
    assert 3 <= committed < 1000
    run = await fluffle.arun([task], rounds=committed + 1, folder=tmp_path)
    assert run.weights["w"].tolist() == [committed + 1.0] * 2


INTERRUPTED = """
import sys, time
import fluffle
from fluffle.keywords import as_keywords
from fluffle.run_folder import RunFolder
from tests.federation.test_local import Adder

def on_round(commit):
    print(commit.round, flush=True)

fluffle.run(
    [Adder(steps=100, step_s=0.001)],
    rounds=1000,
    on_round=on_round,
    progress=True,
    **eval(sys.argv[1]),
)
"""


@pytest.mark.parametrize("with_folder", [True, False])
def test_ctrl_c_ends_a_run_cleanly_and_names_how_to_continue(tmp_path, with_folder):
    options = {"folder": str(tmp_path / "run")} if with_folder else {}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, repr(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert stderr.count('  File "') == 2  # the call, and one of ours
    (folder,) = [path for path in tmp_path.iterdir() if (path / "run.json").exists()]
    committed = len(fluffle.Run(folder).history)
    assert committed >= 1
    assert (
        f"repeat the call with folder={str(folder)!r} to continue after round {committed}" in stderr
    )
    assert "command" not in stderr
    run = fluffle.run([Adder()], rounds=committed + 1, folder=folder)
    assert run.weights["w"].tolist() == [committed + 1.0] * 2


class Broken(Adder):
    """Fails in one of its methods."""

    def __init__(self, where, *, at=1):
        super().__init__()
        self.where, self.at = where, at

    def _perhaps(self, where):
        if where == self.where and self.trained + 1 >= self.at:
            raise ZeroDivisionError("mine")

    def init(self, seed):
        self._perhaps("init")
        return super().init(seed)

    def train(self, weights, plan, progress):
        self._perhaps("train")
        return super().train(weights, plan, progress)

    def evaluate(self, weights):
        self._perhaps("evaluate")
        return super().evaluate(weights)


def test_an_error_of_a_task_is_raised_with_its_name_and_its_own_traceback(tmp_path, capsys):
    with pytest.raises(fluffle.TaskError) as caught:
        fluffle.run({"north": Adder(), "south": Broken("train", at=2)}, folder=tmp_path)
    assert str(caught.value).startswith(
        "the task 'south' failed in round 2: ZeroDivisionError: mine (test_local.py:"
    )
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    frames = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert frames == ["train", "_perhaps"]
    assert capsys.readouterr().err == ""  # it is not shown twice
    assert len(fluffle.Run(tmp_path).history) == 1
    assert fluffle.run([Adder(), Adder()], rounds=2, folder=tmp_path).weights["w"][0] == 2.0


def test_a_task_that_cannot_make_first_weights_is_named_before_anything_runs(capsys):
    with pytest.raises(
        fluffle.TaskError, match="'worker-0' cannot make the first weights: Zero"
    ) as one:
        fluffle.run([Broken("init")])
    assert isinstance(one.value.__cause__, ZeroDivisionError)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("call", [fluffle.run, fluffle.simulate])
def test_a_task_whose_weights_cannot_be_sent_is_named(call):
    class Nested(Adder):
        def init(self, seed):
            return {"p": super().init(seed)}

    with pytest.raises(
        fluffle.TaskError, match="the task 'south' cannot take part: .* nested .* as 'p/w'$"
    ):
        call({"north": Adder(), "south": Nested()}, rounds=1)


def test_a_place_in_fluffles_own_code_is_not_named():
    class Wrong(Adder):
        train = len

    with pytest.raises(fluffle.TaskError, match=r"len\(\) takes .* \(3 given\)$"):
        fluffle.run([Wrong()], rounds=1, progress=False)


def test_a_failing_evaluation_is_reported_and_training_continues(capsys):
    run = fluffle.run({"north": Adder(), "south": Broken("evaluate")}, rounds=2)
    assert run.history["loss"] == [1.0, 2.0]
    stderr = capsys.readouterr().err
    assert "the task 'south': evaluate() failed, so this worker trains without evaluation" in stderr
    assert stderr.count("ZeroDivisionError: mine\n") == 1


def test_a_stopped_run_raises_the_reason_and_how_to_continue(tmp_path):
    class Late(Adder):
        def train(self, weights, plan, progress):
            while self.trained:
                progress(1, 2, None)
                time.sleep(0.01)
            return super().train(weights, plan, progress)

    late = Late()
    fluffle.run([late], folder=tmp_path, rounds=1)
    with pytest.raises(fluffle.RunError, match=r"the run stopped: .*to continue after round 1$"):
        fluffle.run([late], folder=tmp_path, rounds=2, deadline=0.2, max_round=0.3)


def test_a_reason_is_said_once():
    class Failing(Adder):
        def train(self, weights, plan, progress):
            raise ZeroDivisionError("mine")

    with pytest.raises(fluffle.RunError) as stopped:
        fluffle.simulate([Failing()], rounds=1)
    assert str(stopped.value).count("mine") == 1


def test_a_task_without_examples_is_told_to_check_its_data():
    empty = Adder()
    empty.num_examples = 0
    with pytest.raises(fluffle.TaskError, match="no examples to train on; check the task's data$"):
        fluffle.run([empty], rounds=1)


def test_errors_name_keywords_and_leave_command_lines_as_they_are():
    again = "run the same command again (no update is lost)"  # in memory, it would be
    text = f"--max-round, --run and --elsewhere; 'fluffle history x' (--deadline); {again}"
    with pytest.raises(fluffle.RunError) as named, as_keywords():
        raise fluffle.RunError(text)
    assert str(named.value) == (
        "max_round=, folder= and --elsewhere; 'fluffle history x' (deadline=); repeat the call"
    )


@pytest.mark.parametrize(
    ("function", "failed"), [(fluffle.run, "failed"), (fluffle.simulate, "failed again")]
)
def test_a_rejected_update_of_a_task_ends_the_run(function, failed, tmp_path):
    class Diverging(Adder):
        def train(self, weights, plan, progress):
            self.trained += 1
            factor = np.nan if weights["w"][0] >= 1 else 1
            return fluffle.TrainResult({"w": weights["w"] * factor + 1}, 10)

    tasks = {"north": Adder(), "south": Diverging()}
    said = f"^the task 'south' {failed} in round 2: its update was rejected .tensor 'w' has"
    with pytest.raises(fluffle.TaskError, match=said):
        function(tasks, rounds=3, folder=tmp_path)
    assert tasks["north"].trained == 2
    assert tasks["south"].trained <= 3
    assert len(fluffle.Run(tmp_path).history) == 1


def test_an_update_whose_norm_is_too_large_is_named_only_if_the_run_stops_for_it(tmp_path):
    class Far(Adder):
        def train(self, weights, plan, progress):
            step = 1e6 if weights["w"][0] else 1
            return fluffle.TrainResult({"w": weights["w"] + step}, 10)

    tasks = {"a": Far(), "b": Adder(), "c": Adder()}
    run = fluffle.run(tasks, rounds=2, quorum=2, max_norm_ratio=10, parallel=False)
    assert list(run.history[1].participants) == ["b", "c"]
    assert '"rejected":1' in (run.folder / "history.jsonl").read_text().replace(" ", "")
    tasks = {"a": Far(), "b": Adder(), "c": Adder()}
    with pytest.raises(fluffle.RunError, match="the run stopped: .* missing: a;") as stopped:
        fluffle.simulate(tasks, rounds=2, max_norm_ratio=10, on_deadline="stop", folder=tmp_path)
    assert str(stopped.value).count("was rejected: the norm") == 1


def test_tasks_may_come_from_a_generator_or_have_numbers_as_names():
    for function in (fluffle.run, fluffle.simulate):
        run = function((Adder() for _ in range(2)), rounds=1)
        assert len(run.history[0].participants) == 2
        assert list(function({1: Adder()}, rounds=1).history[0].participants) == ["1"]


def test_a_hook_that_stops_a_run_without_a_reason_is_named_as_the_reason():
    def stop(_: fluffle.Commit) -> None:
        raise fluffle.StopRun

    run = fluffle.run([Adder()], rounds=3, on_round=stop)
    assert run.reason == "the on_round hook stopped the run"


def test_a_run_that_a_hook_ends_is_returned():
    def on_round(commit):
        if commit.test["w"] >= 2:
            raise fluffle.StopRun("far enough")

    run = fluffle.run(
        [Adder()], rounds=9, evaluate=lambda weights: {"w": weights["w"][0]}, on_round=on_round
    )
    assert (len(run.history), run.reason) == (2, "far enough")


def test_tasks_train_in_parallel():
    both = threading.Barrier(2, timeout=60)

    class Together(Adder):
        def train(self, weights, plan, progress):
            both.wait()
            return super().train(weights, plan, progress)

    assert len(fluffle.run([Together(), Together()], rounds=2, parallel=True).history) == 2
    assert len(fluffle.run([Together(), Together()], rounds=1, quorum="99%").history) == 1


def test_tasks_may_be_functions_and_strategies_objects():
    class Half(fluffle.Strategy):
        def init(self, weights):
            return []

        def fold(self, state, one):
            return [*state, one.delta["w"]]

        def finish(self, state, weights):
            return {"w": weights["w"] + sum(state) / 2 / len(state)}, []

    run = fluffle.run({"north": Adder, "south": lambda: Adder(steps=2)}, rounds=3, strategy=Half())
    assert run.weights["w"].tolist() == [1.5, 1.5]
    assert fluffle.run([Adder()], rounds=1, strategy=fluffle.fedavg).weights["w"][0] == 1.0


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "needs at least one task; pass tasks, or pass url="),
        ([Adder()], {"ronds": 3}, "unknown keyword 'ronds'; did you mean 'rounds'"),
        ([Adder()], {"rounds": 0}, "rounds = 0 is not valid (0 is not in the range"),
        (
            [Adder()],
            {"quorum": 2},
            "quorum = 2 needs at least 2 workers, but the number",
        ),
        ([Adder()], {"min_workers": 2}, "min_workers = 2 needs at least 2 workers, but"),
        ([Adder()], {"dashboard": "127.0.0.1:0"}, "has no dashboard=; "),
        ([Adder()], {"verify_users": True}, "verify_users= needs url=, because"),
        ([Adder()], {"run": "runs/x"}, "has no run=; use folder= for the run folder"),
        ([Adder()], {"local_rule": "scaffold"}, "has no local_rule=; give local_rule= to flax_"),
        ([Adder()], {"schedule": "buffered", "grace": 1.0}, "grace= has no effect with schedule="),
        ([Adder()], {"strategy": "nosuch"}, "unknown strategy 'nosuch'"),
        ([Adder()], {"strategy": Adder()}, "lacks broadcast(), fold()"),
        ([Adder()], {"strategy": Adder}, "strategy= Adder is a class or a function, not a strat"),
        ([Adder()], {"strategy": "median"}, "strategy = median needs at least 3 workers, but the"),
        ([Adder()], {"strategy": "krum:f=9", "quorum": 1}, "needs at least 21 updates per round"),
        ([Adder()], {"federation": None}, "(): federation = None, but a value is required"),
        ([Adder()], {"folder": 3}, "folder = 3 is not a path; use text such as"),
        ([Adder()], {"folder": b"x"}, "folder = b'x' is not a path"),
        ([Adder()], {"folder": "\0"}, r"folder = '\x00' is not a path"),
        ([Adder()], {"evaluate": 7}, "evaluate= must be a function, not int"),
        (
            [Adder()],
            {"init": ""},
            'init = "" is not valid (the value is empty; give a value, or omit this',
        ),
        ([Adder()], {"folder": ""}, "folder= is empty; give a folder, or omit folder="),
        ([Adder()], {"train": ["w" * 501]}, "train=: 'www"),
        ({"a b": Adder()}, {}, "'a b' is not a valid worker ID; use at most 64 letters"),
        ("digits.py:task", {}, "mapping of names to tasks, not 'digits.py:task'"),
        (Adder(), {}, "expected a list of tasks or a mapping of names to tasks, not <"),
        ([3], {}, "the task 'worker-0' is 3, which has no method 'init'; expected an object"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(tasks, options, message):
    with pytest.raises(fluffle.UsageError) as wrong:
        fluffle.run(tasks, **options)
    assert message in str(wrong.value)
    assert "\n" not in str(wrong.value)


ONE = "def one(candidates, count, draw):\n    return [candidates[0].name]\n"


@pytest.mark.parametrize("fraction", [0.6, 1.0])
@pytest.mark.parametrize("rule", ["poisson", "mine.py:one"])
def test_a_round_closes_however_few_workers_it_selects(tmp_path, monkeypatch, rule, fraction):
    (tmp_path / "mine.py").write_text(ONE)
    monkeypatch.chdir(tmp_path)
    late = {"deadline": 3.0, "on_deadline": "stop"}
    run = fluffle.run([Adder() for _ in range(3)], rounds=9, select=rule, fraction=fraction, **late)
    sizes = {len(each.participants) for each in run.history}
    assert sizes == ({1} if rule != "poisson" else {1, 2, 3} if fraction < 1 else {3})


def test_a_selection_by_evaluations_goes_on_after_a_restart(tmp_path, monkeypatch):
    class Scored(Adder):
        def __init__(self, loss):
            super().__init__()
            self.loss = loss

        def evaluate(self, weights):
            return fluffle.EvalResult(self.loss, 1)

    (tmp_path / "mine.py").write_text(
        "def hardest(candidates, count, draw):\n"
        "    def loss(one):\n"
        "        return one.evaluation['loss'] if one.evaluation else float('inf')\n"
        "    return [one.name for one in sorted(candidates, key=loss, reverse=True)][:count]\n"
    )
    monkeypatch.chdir(tmp_path)
    tasks = {name: Scored(loss) for name, loss in (("a", 1.0), ("b", 3.0), ("c", 2.0))}
    options = {"select": "mine.py:hardest", "sample": 1, "folder": "run"}
    for rounds in (6, 8):  # the first round has no model to evaluate; then each worker has its turn
        run = fluffle.run(tasks, rounds=rounds, **options)
    assert [*map("".join, (each.participants for each in run.history))] == [*"aabcbbbb"]


def test_a_run_that_the_budget_ends_says_so(tmp_path):
    options = {"strategy": "dp:clip=1,noise=4,workers=2,budget=2", "folder": tmp_path}
    for _ in range(2):
        run = fluffle.run([Adder(), Adder()], rounds=50, **options)
        assert re.fullmatch(
            r"4 rounds are done; the strategy dp:.*budget=2\S* allows no more rounds", run.reason
        )
    run = fluffle.run([Adder(), Adder()], rounds=4, strategy=options["strategy"])
    assert run.reason == "4 rounds are done"


def test_a_poisson_sample_has_enough_workers_for_the_strategy():
    tasks = [Adder() for _ in range(8)]
    options = {"select": "poisson", "fraction": 0.4, "deadline": 3.0, "on_deadline": "stop"}
    run = fluffle.run(tasks, rounds=6, strategy="median", **options)
    assert min(len(each.participants) for each in run.history) >= 3


def test_a_folder_that_is_in_use_is_named(tmp_path):
    def on_round(commit):
        with pytest.raises(
            fluffle.RunError, match=r"another coordinator \(process \d+ on .+\) is using"
        ):
            fluffle.run([Adder()], folder=tmp_path)

    assert fluffle.run([Adder()], rounds=1, folder=tmp_path, on_round=on_round).reason


def test_a_folder_that_cannot_be_locked_is_an_error_in_one_line(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = r"^cannot use the run folder .*\(No locks available\); .* folder=[^\n]*$"
    with pytest.raises(fluffle.RunError, match=message):
        fluffle.run([Adder()], rounds=1, folder=tmp_path)


def test_progress_is_shown_on_request(capsys):
    fluffle.run([Adder()], rounds=1, progress=True)
    assert "round 1: loss 1.0000, accuracy 0.5000 on 5 held-out examples" in capsys.readouterr().err
    fluffle.run([Adder()], rounds=1)  # no terminal
    assert capsys.readouterr() == ("", "")


def test_an_update_that_is_far_too_large_is_shown_with_the_keyword_that_rejects_it(capsys):
    class Wild(Adder):
        def train(self, weights, plan, progress):
            return fluffle.TrainResult({"w": weights["w"] - 100}, 10)

    fluffle.run([Adder(), Adder(), Wild()], rounds=1, progress=True)
    shown = capsys.readouterr().err
    assert "the norm of the update of worker-2 is 141, but the median is 1.41" in shown
    assert shown.splitlines()[0].endswith("or reject such updates with max_norm_ratio=")


def test_the_last_evaluation_fits_next_to_the_bar_of_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("fluffle.progress.can_redraw", lambda _: True)
    with Progress(None, 8) as shown:
        shown.record(Evaluated(round=8, loss=0.1648, num_examples=150, metrics={"accuracy": 0.94}))
        shown.show(
            machine.start(Rules(rounds=8), "r", now=0.0).replace(round=9, phase=Phase.ENDED), 0.0
        )
        (task,) = shown._bar.tasks
    assert task.description.endswith("accuracy 0.9400 on 150 held-out examples")
    assert task.fields["brief"] == "round 8: loss 0.1648, accuracy 0.9400"
    assert capsys.readouterr().err.rstrip().endswith("8/8  round 8: loss 0.1648, accuracy 0.9400")


def test_a_terminal_that_cannot_redraw_a_bar_gets_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    for module in ("fluffle.progress", "fluffle_common.cli.printing"):
        monkeypatch.setattr(f"{module}.is_terminal", lambda _: True)
    fluffle.run([Adder()], rounds=1)
    assert "round 1: loss 1.0000" in capsys.readouterr().err


def test_a_run_without_rounds_left_says_so(tmp_path, capsys):
    fluffle.run([Adder()], rounds=3, folder=tmp_path, progress=True)
    assert "already" not in capsys.readouterr().err
    run = fluffle.run([Adder()], rounds=2, folder=tmp_path, progress=True)
    assert len(run.history) == 3
    assert "the run has 3 rounds already, and rounds=2, so no round" in capsys.readouterr().err
    fluffle.run([Adder()], rounds=2, folder=tmp_path)  # no terminal
    assert capsys.readouterr() == ("", "")


def test_a_repair_of_the_run_folder_is_reported_because_rounds_are_repeated(tmp_path, capsys):
    fluffle.run([Adder()], rounds=2, folder=tmp_path)
    (tmp_path / "round-0002.safetensors").write_bytes(b"")
    fluffle.run([Adder()], rounds=3, folder=tmp_path)  # no terminal
    assert capsys.readouterr().err.endswith(
        "continuing from the newest intact checkpoint, which belongs to round 1\n"
    )
    fluffle.run([Adder()], rounds=1, folder=tmp_path, fresh=True)  # no repair
    assert capsys.readouterr().err == ""


def test_what_a_run_waits_for_in_vain_is_reported_without_a_terminal(tmp_path, monkeypatch, capsys):
    append, refused = history.History.append, []

    def full(self, line):
        if not refused:
            refused.append(line)
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, line)

    monkeypatch.setattr(history.History, "append", full)
    monkeypatch.setattr(committer, "_DISK_RETRY_S", 0.0)
    fluffle.run([Adder()], rounds=1, folder=tmp_path)
    assert capsys.readouterr().err == (
        f"cannot write to {tmp_path} (No space left on device); trying again every 0 s\n"
    )
    for event in (NoBroker(address="amqp://h/", reason="x"), Blocked(reason="memory")):
        Progress(None, 1).record(event)
    nobody, blocked = capsys.readouterr().err.splitlines()
    assert nobody.startswith("no broker at amqp://h/ (x)")
    assert blocked.startswith("the broker accepts no messages for now (memory)")


async def test_a_traceback_shows_the_call_and_not_what_it_calls(tmp_path):
    for call in (fluffle.run, fluffle.simulate):
        with pytest.raises(fluffle.UsageError, match="unknown keyword 'round'") as caught:
            call([Adder()], round=8)
        assert len(traceback.extract_tb(caught.value.__traceback__)) == 2
    with pytest.raises(fluffle.TaskError) as failed:
        await fluffle.arun([Broken("train")])
    assert len(traceback.extract_tb(failed.value.__traceback__)) == 2


def test_a_metric_that_no_model_has_is_named(capsys):
    fluffle.run([Adder()], rounds=2, monitor="nope")  # no terminal
    assert capsys.readouterr().err == (
        "no round has the metric 'nope' (monitor=); choose from loss, accuracy\n"
    )


def test_a_run_leaves_few_models_to_the_garbage_collector():
    class Large(Adder):
        def init(self, seed):
            return {"w": np.zeros(250_000, np.float32)}  # 1 MB

    fluffle.run([Large() for _ in range(3)], rounds=2)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        fluffle.run([Large() for _ in range(3)], rounds=2)
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert left < 3_000_000


def test_no_thread_is_left_behind():
    before = set(threading.enumerate())
    fluffle.run([Adder(), Adder()], rounds=2, parallel=True)
    assert set(threading.enumerate()) <= before


def test_a_hook_may_change_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    run = fluffle.run(
        [Adder()],
        rounds=2,
        folder="run",
        progress=False,
        on_round=lambda _: os.chdir(tmp_path / "other"),
    )
    assert run.folder == tmp_path / "run"
    assert len(run.history.rounds) == 2
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("function", [fluffle.run, fluffle.simulate])
def test_a_function_that_makes_a_task_may_change_the_working_directory(
    tmp_path, monkeypatch, function
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    save_checkpoint(Path("first.safetensors"), Adder().init(0), {})
    Path("mine.py").write_text("from fluffle_coordinator.strategy.fedavg import fedavg\n")

    def made() -> Adder:
        os.chdir(tmp_path / "other")
        return Adder()

    named = {"folder": "run", "init": "first.safetensors", "strategy": "mine.py:fedavg"}
    assert function([made, made], rounds=1, **named).folder == tmp_path / "run"
    assert not list((tmp_path / "other").iterdir())
