"""Accuracy of the strategies on scikit-learn's digits, partitioned among ten workers.

    python -m benchmarks.algorithms --json

Only the strategies are fluffle's. The workers are a few lines of NumPy here, softmax regression
trained by plain SGD, so that a comparison takes a minute. Of the 1,797 images, 1,500 are training
data and the rest test data. There are four cases:

``iid``       Each worker has 150 random images.
``shards``    Each worker has two shards of the images sorted by label: two to four digits.
``uneven``    Like ``shards``; in each round, each worker trains for a random 1 to 5 epochs.
``attacked``  Like ``iid``, but two of the ten workers send their update times -10.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.arrays import Array
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy

CASES = ("iid", "shards", "uneven", "attacked")
STRATEGIES = (
    "fedavg",
    "uniform",
    "qfedavg:q=1,lr=0.1",
    "fednova",
    "fedavgm:lr=1,momentum=0.5",
    "fedadagrad:lr=0.1",
    "fedadam:lr=0.03",
    "fedyogi:lr=0.03",
    "median",
    "trimmed:0.2",
    "krum:f=2",
    "multikrum:f=2,m=4",
    "rfa",
    "clip:1+median",
)
WORKERS, ATTACKERS, TRAINING = 10, 2, 1500
_RATE, _BATCH = 0.1, 25


class Digits:
    """The partitioned digits and the workers' training.

    Args:
        case: one of ``CASES``.
        seed: determines the partition, the order of the batches and the numbers of epochs.
    """

    def __init__(self, case: str = "iid", seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        inputs, labels = load_digits(return_X_y=True)
        numbers = np.random.default_rng(seed)
        order = numbers.permutation(len(labels))
        inputs, labels = inputs[order] / 16, labels[order]
        self.case, self._numbers = case, numbers
        self._test = inputs[TRAINING:], labels[TRAINING:]
        places = np.arange(TRAINING)
        if case in ("shards", "uneven"):
            by_label = np.argsort(labels[:TRAINING], kind="stable")
            shards = np.split(by_label, 2 * WORKERS)
            places = np.concatenate([shards[shard] for shard in numbers.permutation(len(shards))])
        self._shares = [(inputs[some], labels[some]) for some in np.split(places, WORKERS)]

    def updates(self, weights: Mapping[str, Array]) -> Iterator[Contribution]:
        """Train all workers from ``weights`` and yield their contributions."""
        for worker, (inputs, labels) in enumerate(self._shares):
            epochs = int(self._numbers.integers(1, 6)) if self.case == "uneven" else 2
            delta, metrics = self._trained(weights, inputs, labels, epochs)
            if self.case == "attacked" and worker < ATTACKERS:
                delta = {name: -10 * tensor for name, tensor in delta.items()}
            yield Contribution(
                worker=f"w{worker}", num_examples=len(labels), delta=delta, metrics=metrics
            )

    def _trained(
        self, weights: Mapping[str, Array], inputs: Array, labels: Array, epochs: int
    ) -> tuple[dict[str, Array], dict[str, float]]:
        kernel, bias, losses = weights["kernel"].copy(), weights["bias"].copy(), []
        for _ in range(epochs):
            for batch in np.split(self._numbers.permutation(len(labels)), len(labels) // _BATCH):
                gradient = softmax(inputs[batch] @ kernel + bias)
                correct = np.arange(_BATCH), labels[batch]
                losses.append(-np.log(np.maximum(gradient[correct], 1e-12)).mean())
                gradient[correct] -= 1
                kernel -= _RATE * inputs[batch].T @ gradient / _BATCH
                bias -= _RATE * gradient.mean(axis=0)
        delta = {"kernel": kernel - weights["kernel"], "bias": bias - weights["bias"]}
        return delta, {"loss": float(np.mean(losses)), "steps": float(len(losses))}

    def accuracy(self, weights: Mapping[str, Array]) -> float:
        """Return the accuracy of a model on the test images."""
        inputs, labels = self._test
        predicted = np.argmax(inputs @ weights["kernel"] + weights["bias"], axis=1)
        return float((predicted == labels).mean())


def softmax(scores: Array) -> Array:
    """Return the softmax of scores of shape [examples, classes]."""
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def accuracies(name: str, case: str, rounds: int, seed: int = 0) -> list[float]:
    """Return the accuracy after each round of a federation."""
    digits, strategy = Digits(case, seed), named_strategy(name).strategy
    weights: Mapping[str, Array] = {"kernel": np.zeros((64, 10)), "bias": np.zeros(10)}
    state, after_each_round = strategy.init(weights), []
    for _ in range(rounds):
        for contribution in digits.updates(weights):
            state = strategy.fold(state, contribution)
        weights, state = strategy.finish(state, weights)
        after_each_round.append(digits.accuracy(weights))
    return after_each_round


def measure(strategies: Sequence[str], rounds: int, seeds: int) -> dict[str, Any]:
    """Return the final accuracy of each strategy in each case, averaged over the seeds."""
    by_strategy = {
        name: {
            case: round(
                float(np.mean([accuracies(name, case, rounds, seed)[-1] for seed in range(seeds)])),
                3,
            )
            for case in CASES
        }
        for name in strategies
    }
    return {"rounds": rounds, "seeds": seeds, "strategies": by_strategy}


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [name, *(f"{100 * by_case[case]:.1f}" for case in CASES)]
        for name, by_case in results["strategies"].items()
    ]
    return command.table([f"accuracy after {results['rounds']} rounds, %", *CASES], rows)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("algorithms", __doc__)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each run (10)")
    parser.add_argument("--seeds", type=int, default=5, help="runs to average over (5)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="strategies, by name")
    options = parser.parse_args()
    command.show(measure(options.strategies, options.rounds, options.seeds), options, as_text)


if __name__ == "__main__":
    main()
