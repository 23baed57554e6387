"""How long a simulation takes, all in all: starting, compiling, testing and writing included.

    python -m benchmarks.simulation --job lr
    python -m benchmarks.simulation --job emnist --rounds 20 --json

Three jobs, each of random data of the shape that is named:

- ``lr``: 1,000 clients with 60 MNIST-shaped examples each, 10 of them a round, logistic regression,
  batches of 10, one epoch, 100 rounds, tested every 20;
- ``emnist``: 340 clients a round with 100 EMNIST-shaped examples each, a dense network 784-128-62,
  batches of 20, one epoch;
- ``noop``: 100 clients that train nothing and send a model of 1.36 MB.

``seconds`` counts from the start of this program, its imports included; ``seconds_a_round`` is the
median time from one committed round to the next.
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
from benchmarks import command, figures
from benchmarks.noop import Noop
from benchmarks.processes import machine, scratch

_SIDE = 28 * 28
_HELD_OUT = 10_000


@dataclass(frozen=True)
class Job:
    """One job.

    Args:
        rounds: how many, unless others are asked for.
        wanted: the most that it may take, of ``seconds`` or of ``seconds_a_round``.
        arguments: makes the arguments of ``fluffle.simulate``.
    """

    rounds: int
    wanted: Mapping[str, float]
    arguments: Callable[[], dict[str, Any]]


def _classifier(width: int, classes: int, each: int, clients: int) -> Any:
    """Return a classifier of random images; ``width`` 0 has no hidden layer."""
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
    """Simulate a job and return what it took."""
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
        "seconds_a_round": round(statistics.median(figures.gaps(committed)), 4),
        "to_the_first_round_s": round(committed[0] - _BEGAN_AT, 3),
        "cpu_s": round(time.process_time(), 3),
    }


def as_text(told: Mapping[str, Any]) -> str:
    """Lay out what was found, for people."""
    rows = [
        [what, told[what], f"<= {told['wanted'][what]:g}" if what in told["wanted"] else None]
        for what in ("seconds", "seconds_a_round", "to_the_first_round_s", "cpu_s")
    ]
    return figures.table([told["job"], "found", "wanted"], rows)


def main() -> None:
    """Run one job."""
    parser = command.parser("simulation", __doc__)
    parser.add_argument("--job", choices=sorted(JOBS), default="lr", help="which (%(default)s)")
    parser.add_argument("--rounds", type=int, help="how many; each job has its own number")
    options = parser.parse_args()
    job = JOBS[options.job]
    rounds = options.rounds or job.rounds
    told = {"job": options.job, "rounds": rounds, "wanted": job.wanted, **machine()}
    command.show(told | run(job, rounds), options, as_text)


if __name__ == "__main__":
    main()
