"""Time of whole simulations, including imports, compilation, tests and files.

    python -m benchmarks.simulation --job lr
    python -m benchmarks.simulation --job emnist --rounds 20 --json

There are three jobs, on random data of the given shapes:

``lr``      1,000 clients with 60 MNIST-shaped examples each, of which 10 take part in a round;
            logistic regression, batches of 10, one epoch, 100 rounds, a test every 20 rounds
``emnist``  340 clients per round with 100 EMNIST-shaped examples each; a dense network 784-128-62,
            batches of 20, one epoch
``noop``    100 clients that do not train and send a model of 1.36 MB

``seconds`` is the time since the start of this program, including its imports; ``seconds_a_round``
is the median time between commits.
"""

# ruff: noqa: E402 - the imports are part of what is measured

from __future__ import annotations

import time

_BEGAN_AT = time.perf_counter()

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import fluffle
from benchmarks import command, stats
from benchmarks.noop import Noop
from benchmarks.processes import machine, scratch

_SIDE = 28 * 28
_HELD_OUT = 10_000


@dataclass(frozen=True)
class Job:
    """One job.

    Args:
        rounds: the default number of rounds.
        targets: upper limits of results, by name.
        arguments: returns the arguments of ``fluffle.simulate``.
    """

    rounds: int
    targets: Mapping[str, float]
    arguments: Callable[[], dict[str, Any]]


def _classifier(width: int, classes: int, each: int, clients: int) -> Any:
    """Return a task that classifies random images; with ``width`` 0, without a hidden layer."""
    import optax
    from flax import nnx

    class Dense(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(_SIDE, width, rngs=rngs) if width else None
            self.out = nnx.Linear(width or _SIDE, classes, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(x if self.hidden is None else nnx.relu(self.hidden(x)))

    rng = np.random.default_rng(0)

    def examples(count: int) -> tuple[Any, Any]:
        images = rng.random((count, _SIDE), np.float32)
        return images, rng.integers(0, classes, count, np.int32)

    return fluffle.flax_task(
        Dense,
        optax.softmax_cross_entropy_with_integer_labels,
        optax.sgd,
        examples(each * clients),
        examples(_HELD_OUT),
        learning_rate=0.03,
        metrics={"accuracy": fluffle.accuracy},
    )


def _lr() -> dict[str, Any]:
    task = _classifier(0, 10, each=60, clients=1000)
    return {
        "tasks": task,
        "clients": 1000,
        "fraction": 0.01,
        "batch_size": 10,
        "epochs": 1,
        "test_every": 20,
    }


def _emnist() -> dict[str, Any]:
    task = _classifier(128, 62, each=100, clients=340)
    return {"tasks": task, "clients": 340, "batch_size": 20, "epochs": 1, "test_every": 20}


def _noop() -> dict[str, Any]:
    return {"tasks": [Noop(1_360_000, seed) for seed in range(100)]}


JOBS = {
    "lr": Job(100, {"seconds": 10.0}, _lr),
    "emnist": Job(20, {"seconds_a_round": 1.0}, _emnist),
    "noop": Job(20, {"seconds_a_round": 0.3}, _noop),
}


def run(job: Job, rounds: int) -> dict[str, Any]:
    """Simulate a job and return its times."""
    committed: list[float] = []

    def on_round(_: fluffle.Commit) -> None:
        committed.append(time.perf_counter())

    with scratch() as folder:
        done = fluffle.simulate(
            **job.arguments(),
            rounds=rounds,
            folder=folder / "run",
            on_round=on_round,
            progress=False,
        )
        assert len(done.history) == rounds
    return {
        "seconds": round(time.perf_counter() - _BEGAN_AT, 3),
        "seconds_a_round": round(statistics.median(stats.gaps(committed)), 4),
        "to_the_first_round_s": round(committed[0] - _BEGAN_AT, 3),
        "cpu_s": round(time.process_time(), 3),
    }


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [
            name,
            results[name],
            f"<= {results['targets'][name]:g}" if name in results["targets"] else None,
        ]
        for name in ("seconds", "seconds_a_round", "to_the_first_round_s", "cpu_s")
    ]
    return command.table([results["job"], "result", "target"], rows)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("simulation", __doc__)
    parser.add_argument("--job", choices=sorted(JOBS), default="lr", help="job (%(default)s)")
    parser.add_argument("--rounds", type=int, help="number of rounds; each job has its own default")
    options = parser.parse_args()
    job = JOBS[options.job]
    rounds = options.rounds or job.rounds
    results = {"job": options.job, "rounds": rounds, "targets": job.targets, **machine()}
    command.show(results | run(job, rounds), options, as_text)


if __name__ == "__main__":
    main()
