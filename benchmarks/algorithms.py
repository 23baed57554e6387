"""Accuracy of the strategies on handwriting, partitioned among ten workers.

    python -m benchmarks.algorithms --json
    python -m benchmarks.algorithms --data letters --json

Only the strategies are fluffle's. The workers are a few lines of NumPy here, softmax regression
trained by plain SGD, so that a comparison takes a minute or two. 1,500 examples are training data,
the rest test data.

``digits``    1,797 images of scikit-learn, 8 by 8 pixels.
``letters``   1,800 letters A to J as ``fluffle letters`` draws them, 180 by each of ten writers,
              scaled down to 20 by 20 pixels.

The cases:

``iid``       Each worker has 150 random images.
``writers``   Only for letters: each worker has the letters of one writer.
``shards``    Each worker has two shards of the images sorted by label: two to four labels.
``uneven``    Like ``shards``; in each round, each worker trains for a random 1 to 5 epochs.
``attacked``  Like ``iid``, but two of the ten workers send their update times -10.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.arrays import Array
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy
from fluffle_worker.letters.handwriting.drawing import PENS_PX, draw_letter, writer_style
from fluffle_worker.letters.handwriting.strokes import LETTERS

CASES = {
    "digits": ("iid", "shards", "uneven", "attacked"),
    "letters": ("iid", "writers", "shards", "uneven", "attacked"),
}
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
WORKERS, ATTACKERS, TRAINING, LETTERS_EACH = 10, 2, 1500, 180
_RATE, _BATCH = 0.1, 25


@functools.cache
def examples(data: str) -> tuple[Array, Array, Array]:
    """Return inputs of shape [examples, pixels] in [0, 1], their labels and their writers."""
    if data == "digits":
        from sklearn.datasets import load_digits

        inputs, labels = load_digits(return_X_y=True)
        return inputs / 16, labels, np.zeros_like(labels)
    inputs, labels, writers = [], [], []
    for writer in range(WORKERS):
        numbers = np.random.default_rng(writer)
        style = writer_style(numbers, favourite_pen=writer % len(PENS_PX))
        for number in range(LETTERS_EACH):
            label = number % len(LETTERS)
            pixels = draw_letter(LETTERS[label], style, numbers) / 255
            inputs.append(pixels.reshape(20, 5, 20, 5).mean(axis=(1, 3)).ravel())
            labels.append(label)
            writers.append(writer)
    return np.array(inputs), np.array(labels), np.array(writers)


class Partitioned:
    """The partitioned examples and the workers' training.

    Args:
        data: ``digits`` or ``letters``.
        case: one of the ``CASES`` of these data.
        seed: determines the partition, the order of the batches and the numbers of epochs.
    """

    def __init__(self, data: str = "digits", case: str = "iid", seed: int = 0) -> None:
        inputs, labels, writers = examples(data)
        numbers = np.random.default_rng(seed)
        order = numbers.permutation(len(labels))
        if case == "writers":  # as many of each for the test
            order = order[np.argsort(writers[order], kind="stable")].reshape(WORKERS, -1)
            each = TRAINING // WORKERS
            order = np.concatenate([order[:, :each].ravel(), order[:, each:].ravel()])
        inputs, labels = inputs[order], labels[order]
        self.case, self._numbers = case, numbers
        self._test = inputs[TRAINING:], labels[TRAINING:]
        self.shape = inputs.shape[1], len(np.unique(labels))
        places = np.arange(TRAINING)
        if case in ("shards", "uneven"):
            by_label = np.argsort(labels[:TRAINING], kind="stable")
            shards = np.split(by_label, 2 * WORKERS)
            places = np.concatenate([shards[shard] for shard in numbers.permutation(len(shards))])
        self._shares = [(inputs[some], labels[some]) for some in np.split(places, WORKERS)]

    def updates(self, weights: Mapping[str, Array]) -> Iterator[Contribution]:
        """Yield the update of each worker, trained from these weights."""
        for worker, (inputs, labels) in enumerate(self._shares):
            epochs = int(self._numbers.integers(1, 6)) if self.case == "uneven" else 2
            delta, metrics = self._trained(weights, inputs, labels, epochs)
            if self.case == "attacked" and worker < ATTACKERS:
                delta = {name: -10 * one for name, one in delta.items()}
            yield Contribution(
                worker=f"w{worker}", num_examples=len(labels), delta=delta, metrics=metrics
            )

    def _trained(
        self, weights: Mapping[str, Array], inputs: Array, labels: Array, epochs: int
    ) -> tuple[dict[str, Array], dict[str, float]]:
        trained = {name: one.copy() for name, one in weights.items()}
        orders = [self._numbers.permutation(len(labels)) for _ in range(epochs)]
        metrics = descend(trained, inputs, labels, orders, _BATCH, _RATE)
        return {name: one - weights[name] for name, one in trained.items()}, metrics

    def accuracy(self, weights: Mapping[str, Array]) -> float:
        """Return the share of the test images that a model gets right."""
        inputs, labels = self._test
        found = np.argmax(inputs @ weights["kernel"] + weights["bias"], axis=1)
        return float((found == labels).mean())


def softmax(scores: Array) -> Array:
    """Return the softmax of scores of shape [examples, classes]."""
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def descend(  # noqa: PLR0917
    weights: Mapping[str, Array],
    inputs: Array,
    labels: Array,
    orders: Sequence[Array],
    batch_size: int,
    rate: float,
) -> dict[str, float]:
    """Train ``kernel`` and ``bias`` of softmax regression in place, by plain SGD.

    ``orders`` has the order of the examples in each epoch. Return the mean loss and the number of
    steps.
    """
    kernel, bias, losses = weights["kernel"], weights["bias"], []
    for order in orders:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            shares = softmax(inputs[batch] @ kernel + bias)
            right = np.arange(len(batch)), labels[batch]
            losses.append(-np.log(np.maximum(shares[right], 1e-12)).mean())
            shares[right] -= 1
            kernel -= rate / len(batch) * inputs[batch].T @ shares
            bias -= rate * shares.mean(axis=0)
    return {"loss": float(np.mean(losses)), "steps": float(len(losses))}


def accuracies(name: str, data: str, case: str, rounds: int, seed: int = 0) -> list[float]:
    """Return the accuracy after each round of a federation."""
    workers, strategy = Partitioned(data, case, seed), named_strategy(name).strategy
    weights: Mapping[str, Array] = {
        "kernel": np.zeros(workers.shape),
        "bias": np.zeros(workers.shape[1]),
    }
    state, found = strategy.init(weights), []
    for _ in range(rounds):
        for one in workers.updates(weights):
            state = strategy.fold(state, one)
        weights, state = strategy.finish(state, weights)
        found.append(workers.accuracy(weights))
    return found


def measure(strategies: Sequence[str], data: str, rounds: int, seeds: int) -> dict[str, Any]:
    """Return the final accuracy of each strategy in each case, averaged over the seeds."""

    def averaged(name: str, case: str) -> float:
        last = [accuracies(name, data, case, rounds, seed)[-1] for seed in range(seeds)]
        return round(float(np.mean(last)), 3)

    found = {name: {case: averaged(name, case) for case in CASES[data]} for name in strategies}
    return {"data": data, "rounds": rounds, "seeds": seeds, "strategies": found}


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    cases = CASES[results["data"]]
    rows = [
        [name, *(f"{100 * one[case]:.1f}" for case in cases)]
        for name, one in results["strategies"].items()
    ]
    return command.table([f"accuracy after {results['rounds']} rounds, %", *cases], rows)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("algorithms", __doc__)
    parser.add_argument("--data", choices=CASES, default="digits", help="what is read (digits)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each run (10)")
    parser.add_argument("--seeds", type=int, default=5, help="runs that are averaged (5)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="which, by name")
    options = parser.parse_args()
    found = measure(options.strategies, options.data, options.rounds, options.seeds)
    command.show(found, options, as_text)


if __name__ == "__main__":
    main()
