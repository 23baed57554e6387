"""A task without JAX that trains in a fraction of a second and records every training.

    fluffle worker --task tests/faults/fast_task.py:task --data shard:0/4 ...
    fluffle coordinator --config train_s=0.2 --config slow_s=25 ...

The result depends only on the weights, the plan's seed and the worker's name: training a round
twice gives the same result, and a difference in the last bit of the weights does not grow. Every
training is written to the folder ``$FAULTS_TRAINED`` as an ``.npz`` file before fluffle receives
it: the digest of the received weights, the delta, the number of examples.

The plan's ``config`` has ``train_s``, the duration of a training, and ``slow_s``, the same for
shard 0. While the file ``$FAULTS_HOLD`` exists, no training ends, or, if a number N is in it, none
from the N-th of the process on. ``$FAULTS_KERNEL`` is the number of elements of the one large
tensor.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluffle_common.protocol.messages import Plan
from fluffle_worker.task import EvalResult, TaskOptions, TrainResult

Weights = Mapping[str, np.ndarray[Any, Any]]

_STEP_S = 0.02
_SHRINK = 0.9


class FastTask:
    """Pulls the weights towards noise that depends on the worker."""

    def __init__(self, options: TaskOptions) -> None:
        shard, _, shards = options.data.removeprefix("shard:").partition("/")
        self.shard, self.shards = int(shard), int(shards)
        self.num_examples = 50 + 13 * self.shard
        self._worker = options.worker
        self._folder = Path(os.environ["FAULTS_TRAINED"])
        self._trained = 0
        self._hold = Path(os.environ["FAULTS_HOLD"]) if "FAULTS_HOLD" in os.environ else None

    def init(self, seed: int) -> Weights:
        """Return the first weights."""
        return first_weights(seed)

    def train(
        self,
        weights: Weights,
        plan: Plan,
        progress: Callable[[int, int, float | None], None],
    ) -> TrainResult:
        """Train for as long as the plan says."""
        received = digest(weights)
        seconds = float(plan.config.get("train_s", 0.0))
        if self.shard == 0:
            seconds = float(plan.config.get("slow_s", seconds))
        steps = max(1, round(seconds / _STEP_S))
        began = time.monotonic()
        for step in range(1, steps + 1):
            time.sleep(max(0.0, began + step * seconds / steps - time.monotonic()))
            progress(step, steps, 1.0 / step)
        while self._is_held():
            time.sleep(_STEP_S)
            progress(steps, steps, 1.0 / steps)
        trained = self._learn(weights, f"{plan.seed}/{self._worker}")
        self._record(received, weights, trained)
        return TrainResult(trained, self.num_examples, {"loss": 1.0 / steps})

    def evaluate(self, weights: Weights) -> EvalResult:
        """Return the distance of the weights from zero as the loss."""
        return EvalResult(float(np.mean(np.square(weights["dense/kernel"]))), self.num_examples)

    def _is_held(self) -> bool:
        if self._hold is None:
            return False
        try:
            return self._trained + 1 >= int(self._hold.read_text() or 1)
        except FileNotFoundError:
            return False

    def _learn(self, weights: Weights, lot: str) -> dict[str, np.ndarray[Any, Any]]:
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(lot.encode()).digest()[:8]))
        trained = {}
        for name, tensor in sorted(weights.items()):  # a resumed run has another order
            if tensor.dtype.kind == "f":
                noise = rng.normal(size=tensor.shape)
                trained[name] = np.asarray(_SHRINK * tensor + noise, tensor.dtype)
            else:
                trained[name] = tensor + rng.integers(-9, 10, tensor.shape, dtype=tensor.dtype)
        return trained

    def _record(self, received: str, weights: Weights, trained: Weights) -> None:
        deltas = {
            f"delta:{name}": trained[name].astype(np.int64) - weights[name]
            if weights[name].dtype.kind in "iu"
            else trained[name] - weights[name]
            for name in weights
        }
        self._trained += 1
        path = self._folder / f"{self._worker}-{os.getpid()}-{self._trained}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                worker=np.array(self._worker),
                received=np.array(received),
                num_examples=np.array(self.num_examples),
                **deltas,
            )
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)


def task(options: TaskOptions) -> FastTask:
    """Return the task for ``--data shard:I/N``."""
    return FastTask(options)


def first_weights(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the first weights."""
    rng = np.random.default_rng(seed)
    size = int(os.environ.get("FAULTS_KERNEL", "256"))
    return {
        "dense/kernel": rng.normal(size=(size // 16, 16)).astype(np.float32),
        "scale": np.array(rng.normal(), np.float32),
        "counts": rng.integers(-1000, 1000, size=4, dtype=np.int32),
    }


def digest(weights: Weights) -> str:
    """Return a digest of weights."""
    hashed = hashlib.sha256()
    for name in sorted(weights):
        tensor = np.asarray(weights[name])
        hashed.update(f"{name} {tensor.dtype.name} {tensor.shape} ".encode())
        hashed.update(np.ascontiguousarray(tensor).tobytes())
    return hashed.hexdigest()
