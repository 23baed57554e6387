"""Federations of PyTorch models on handwritten digits, alone and beside a task in plain NumPy."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fluffle
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights
from fluffle_worker.task import TaskOptions
from fluffle_worker.task_loading import load_factory
from fluffle_worker.tasks.examples import index_batches

torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency")

from torch import nn  # noqa: E402

OWNERS = {"north": slice(0, 600), "south": slice(600, 1000), "west": slice(1000, 1500)}
TESTED = slice(1500, None)
RATE = 0.5
DOCS = (Path(__file__).parents[2] / "docs/tasks.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS, re.S))


def digits(rows: slice) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.data[rows] / 16).astype(np.float32), data.target[rows]


class Net(nn.Sequential):
    """A convolutional network with batch normalization and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(128, 10),
        )


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, inputs: Any) -> Any:
        return self.linear(inputs)


def task_of(model: Any, rows: slice, optimizer: Any = torch.optim.Adam, **options: Any) -> Any:
    return fluffle.torch_task(
        model,
        nn.functional.cross_entropy,
        optimizer,
        digits(rows),
        digits(TESTED),
        metrics={"accuracy": fluffle.accuracy},
        device="cpu",
        **options,
    )


class NumpySoftmax:
    """The same softmax regression in NumPy."""

    def __init__(self, rows: slice) -> None:
        self.inputs, self.targets = digits(rows)
        self.num_examples = len(self.inputs)

    def init(self, seed: int) -> Weights:
        kernel = np.zeros((10, 64), np.float32)
        return {"linear.weight": kernel, "linear.bias": np.zeros(10, np.float32)}

    def train(self, weights: Weights, plan: Plan, progress: Any) -> fluffle.TrainResult:
        kernel, bias = weights["linear.weight"].copy(), weights["linear.bias"].copy()
        for batch in index_batches(plan, self.num_examples, 0):
            logits = self.inputs[batch] @ kernel.T + bias
            raised = np.exp(logits - logits.max(axis=1, keepdims=True))
            wrong = raised / raised.sum(axis=1, keepdims=True)
            wrong[np.arange(len(batch)), self.targets[batch]] -= 1
            kernel -= RATE * (wrong.T @ self.inputs[batch]) / len(batch)
            bias -= RATE * wrong.mean(axis=0)
        trained = {"linear.weight": kernel, "linear.bias": bias}
        return fluffle.TrainResult(trained, self.num_examples)

    def evaluate(self, weights: Weights) -> None:
        return None


def averaged_in_float64(tasks: dict[str, Any], rounds: int, **plan: Any) -> Weights:
    """Return the average after each round, weighted by examples, without a federation."""
    weights = next(iter(tasks.values())).init(0)
    for number in range(1, rounds + 1):
        of_round = Plan(seed=number, **plan)
        ends = [
            (task.num_examples, task.train(weights, of_round, lambda *_: None).weights)
            for task in tasks.values()
        ]
        total, averages = sum(count for count, _ in ends), {}
        for name, old in weights.items():
            mean = sum(count * end[name].astype(np.float64) for count, end in ends) / total
            averages[name] = (np.rint(mean) if old.dtype.kind == "i" else mean).astype(old.dtype)
        weights = averages
    return weights


def test_three_owners_learn_the_digits_and_the_model_is_their_weighted_average():
    tasks = {
        name: task_of(Net, rows, sample_seed=seed)
        for seed, (name, rows) in enumerate(OWNERS.items())
    }
    done = fluffle.run(tasks, rounds=5, epochs=3, learning_rate=0.01, progress=False)
    assert done.history[-1].metrics["accuracy"] > 0.9
    two = fluffle.run(tasks, rounds=2, epochs=1, learning_rate=0.01, progress=False)
    expected = averaged_in_float64(tasks, 2, epochs=1, learning_rate=0.01)
    assert two.weights.keys() == expected.keys()
    for name, array in two.weights.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    # three epochs of 19, 13 and 16 batches of 32 in a round, weighted by the numbers of examples
    counted = [one for name, one in done.weights.items() if name.endswith("num_batches_tracked")]
    assert counted == [5 * round(3 * (19 * 600 + 13 * 400 + 16 * 500) / 1500)]


@pytest.mark.parametrize("rule", ["proximal:0.01", "scaffold"])
def test_a_local_rule_and_its_strategy_work_with_torch(rule):
    tasks = {
        name: task_of(Softmax, rows, torch.optim.SGD, local_rule=rule)
        for name, rows in OWNERS.items()
    }
    strategy = "scaffold" if rule == "scaffold" else None
    done = fluffle.run(tasks, rounds=4, learning_rate=RATE, strategy=strategy, progress=False)
    assert done.history[-1].metrics["accuracy"] > 0.85


def test_torch_and_numpy_train_one_model_together():
    tasks = {
        "north": task_of(Softmax, OWNERS["north"], torch.optim.SGD),
        "south": NumpySoftmax(OWNERS["south"]),
        "west": task_of(Softmax, OWNERS["west"], torch.optim.SGD),
    }
    done = fluffle.run(tasks, rounds=4, learning_rate=RATE, progress=False)
    assert done.history[-1].metrics["accuracy"] > 0.85
    expected = averaged_in_float64(tasks, 4, learning_rate=RATE)
    for name, array in done.weights.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6)
    module = Softmax()
    fluffle.load_into(module, done.weights)
    inputs, targets = digits(TESTED)
    right = fluffle.accuracy(module(torch.from_numpy(inputs)), torch.from_numpy(targets))
    assert float(right.mean()) == pytest.approx(done.history[-1].metrics["accuracy"], abs=1e-6)


def test_one_backbone_serves_all_workers_if_it_is_shared():
    class Adapted(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
            self.backbone.requires_grad_(False).weight.add_(0.01 * seed)

        def forward(self, inputs: Any) -> Any:
            return self.head(torch.relu(self.backbone(inputs)))

    tasks = {
        name: task_of(functools.partial(Adapted, seed), rows, share_frozen=True)
        for seed, (name, rows) in enumerate(OWNERS.items())
    }
    before = {task.frozen()["backbone.weight"].tobytes() for task in tasks.values()}
    assert len(before) == 3
    done = fluffle.run(tasks, rounds=2, epochs=3, learning_rate=0.01, progress=False)
    assert done.weights.keys() == {"head.weight", "head.bias"}
    assert done.history[-1].metrics["accuracy"] > 0.6
    (shared,) = {task.frozen()["backbone.weight"].tobytes() for task in tasks.values()}
    assert shared in before


def test_clients_of_a_divided_task_are_simulated():
    task = task_of(Softmax, slice(0, 1500), torch.optim.SGD)
    done = fluffle.simulate(
        task, clients=6, partition="dirichlet:1", rounds=3, learning_rate=RATE, progress=False
    )
    assert done.history[-1].test["accuracy"] > 0.8


def test_the_example_of_the_docs_is_a_task(tmp_path):
    path = tmp_path / "torch_digits.py"
    path.write_text(BLOCKS[path.name])
    parts = [load_factory(f"{path}:task")(TaskOptions(f"{n}/3", f"client-{n}")) for n in range(3)]
    done = fluffle.run(parts, rounds=4, epochs=3, progress=False)
    assert done.history[-1].metrics["accuracy"] > 0.85
