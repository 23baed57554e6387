"""Whole federations of Flax tasks, compared with the algorithms' formulas in plain NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

import fluffle
from fluffle import flax_task

FEATURES, WORKERS, RATE, STEPS, ROUNDS = 4, 6, 0.05, 3, 4
EXAMPLES = np.array([5, 9, 14, 20, 33, 8])
Vector = np.ndarray[Any, np.dtype[np.float64]]

pytestmark = pytest.mark.usefixtures("compiled_elsewhere")


def squared(outputs: Any, targets: Any) -> Any:
    return (outputs - targets) ** 2


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(FEATURES, 1, use_bias=False, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.linear(inputs)[:, 0]


def data_of(worker: int) -> tuple[Any, Any]:
    """Return the data of a worker, which have a line and a spread of their own."""
    rng = np.random.default_rng(worker)
    inputs = rng.normal(size=(EXAMPLES[worker], FEATURES)) * (1 + worker / 4)
    return inputs.astype(np.float32), (inputs @ rng.normal(size=FEATURES)).astype(np.float32)


DATA = [data_of(worker) for worker in range(WORKERS)]


def trained(w: Vector, worker: int, pull: float = 0.0, shift: Any = 0.0) -> tuple[Vector, float]:
    """Return the delta and the mean loss of some steps of gradient descent on all examples."""
    inputs, targets = (np.asarray(part, np.float64) for part in DATA[worker])
    y, losses = w, []
    for _ in range(STEPS):
        off = inputs @ y - targets
        losses.append((off**2).mean())
        y = y - RATE * (2 * inputs.T @ off / len(off) + pull * (y - w) + shift)
    return y - w, float(np.mean(losses))


# --- the means, of deltas of shape [workers, features] and losses of shape [workers] -----------


def by_examples(deltas: Vector, losses: Vector) -> Vector:
    return EXAMPLES @ deltas / EXAMPLES.sum()


def q_fair(deltas: Vector, losses: Vector) -> Vector:
    """Li et al. 2020, algorithm 2, with q = 2 and L = 1 / lr, as written there."""
    steps, length = -deltas / RATE, (deltas**2).sum(axis=1) / RATE**2
    h = 2 * losses * length + losses**2 / RATE
    return -(losses**2 @ steps) / h.sum()


def nearest(deltas: Vector, losses: Vector) -> Vector:
    """Krum with f = 1."""
    apart = ((deltas[:, None] - deltas) ** 2).sum(axis=2)
    scores = [np.sort(np.delete(row, i))[: WORKERS - 3].sum() for i, row in enumerate(apart)]
    return deltas[np.argmin(scores)]


def geometric_median(deltas: Vector, losses: Vector) -> Vector:
    middle = deltas.mean(axis=0)
    for _ in range(10_000):
        shares = 1 / np.linalg.norm(deltas - middle, axis=1)
        middle = shares @ deltas / shares.sum()
    return middle


# --- the server steps: Reddi et al. 2021, algorithm 2 ------------------------------------------


def replace(w: Vector, d: Vector, m: Vector, v: Vector, t: int) -> tuple[Vector, Vector, Vector]:
    return w + d, m, v


def momentum(w: Vector, d: Vector, m: Vector, v: Vector, t: int) -> tuple[Vector, Vector, Vector]:
    m = 0.9 * m + d
    return w + 0.5 * m, m, v


def adaptive(second: Callable[[Vector, Vector], Vector], beta1: float = 0.9) -> Any:
    def step(w: Vector, d: Vector, m: Vector, v: Vector, t: int) -> tuple[Vector, Vector, Vector]:
        m, v = beta1 * m + (1 - beta1) * d, second(v, d**2)
        return w + 0.1 * m / (np.sqrt(v) + 1e-3), m, v

    return step


def adamw(w: Vector, d: Vector, m: Vector, v: Vector, t: int) -> tuple[Vector, Vector, Vector]:
    """Loshchilov and Hutter 2019, algorithm 2, with the decay that optax has by default."""
    m, v = 0.9 * m - 0.1 * d, 0.999 * v + 0.001 * d**2
    corrected = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w - 0.1 * (corrected + 1e-4 * w), m, v


adagrad = adaptive(lambda v, d2: v + d2, beta1=0.0)
adam = adaptive(lambda v, d2: 0.99 * v + 0.01 * d2)
yogi = adaptive(lambda v, d2: v - 0.01 * d2 * np.sign(v - d2))


def expected(w: Vector, mean: Any, step: Any = replace, pull: float = 0.0) -> Vector:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, ROUNDS + 1):
        deltas, losses = zip(*(trained(w, worker, pull) for worker in range(WORKERS)), strict=True)
        w, m, v = step(w, mean(np.array(deltas), np.array(losses)), m, v, t)
    return w


def scaffold(w: Vector) -> Vector:
    """Karimireddy et al. 2020, algorithm 1, option II."""
    c, own = np.zeros_like(w), np.zeros((WORKERS, len(w)))
    for _ in range(ROUNDS):
        deltas = np.array([trained(w, i, shift=c - own[i])[0] for i in range(WORKERS)])
        new = own - c - deltas / (STEPS * RATE)
        w, c, own = w + deltas.mean(axis=0), c + (new - own).mean(axis=0), new
    return w


@functools.cache
def tasks(rule: str | None) -> list[Any]:
    """Return the workers' tasks, the same for every strategy, because compiling is slow."""
    return [flax_task(Line, squared, optax.sgd, data, local_rule=rule) for data in DATA]


@pytest.mark.parametrize(
    ("strategy", "rule", "reference"),
    [
        ("fedavg", None, lambda w: expected(w, by_examples)),
        ("fedavg", "proximal:0.7", lambda w: expected(w, by_examples, pull=0.7)),
        ("uniform", None, lambda w: expected(w, lambda deltas, _: deltas.mean(axis=0))),
        (f"qfedavg:q=2,lr={RATE}", None, lambda w: expected(w, q_fair)),
        ("median", None, lambda w: expected(w, lambda deltas, _: np.median(deltas, axis=0))),
        ("krum:f=1", None, lambda w: expected(w, nearest)),
        ("rfa", None, lambda w: expected(w, geometric_median)),
        ("fedavgm:lr=0.5", None, lambda w: expected(w, by_examples, momentum)),
        ("fedadagrad:lr=0.1", None, lambda w: expected(w, by_examples, adagrad)),
        ("fedadam:lr=0.1", None, lambda w: expected(w, by_examples, adam)),
        ("fedyogi:lr=0.1", None, lambda w: expected(w, by_examples, yogi)),
        ("optax:adamw,learning_rate=0.1", None, lambda w: expected(w, by_examples, adamw)),
        ("scaffold", "scaffold", scaffold),
    ],
)
def test_a_federation_follows_the_formulas_of_the_paper(strategy, rule, reference):
    first = tasks(rule)[0].init(0)["linear/kernel"][:, 0].astype(np.float64)
    plan = {"epochs": STEPS, "batch_size": 1000, "learning_rate": RATE}
    run = fluffle.run(tasks(rule), rounds=ROUNDS, strategy=strategy, **plan)
    last = run.weights["linear/kernel"][:, 0]
    # rfa stops when no share changes by more than a millionth; optax computes in float32.
    error = 1e-5 if strategy.startswith(("rfa", "optax")) else 2e-6
    np.testing.assert_allclose(last, reference(first), rtol=0, atol=error)
    assert np.abs(last - first).max() > 0.1
