"""A task that costs nothing, so that what is measured is everything else.

    fluffle worker --task benchmarks.noop:task --data size=10000000,gate=/tmp/x,seed=1

``size`` is in bytes, ``tensors`` says how many it is spread over (8), ``gate`` is the socket of the
benchmark (see ``gate``; none: never waits), and ``seed`` makes a worker's noise its own; with
``noise=0`` it returns what it was given, and with ``evaluates=1`` it says at once how good a model
is.
"""

from __future__ import annotations

from benchmarks.arrays import TENSORS, Perturbation, make_weights
from benchmarks.gate import Gate
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights
from fluffle_worker.task import EvalResult, Progress, TaskOptions, TrainResult


class Noop:
    """Adds noise to what it receives; has nothing held out, unless it is told to.

    Args:
        size_bytes: of the model.
        seed: makes the noise this worker's own.
        gate: whom to ask before each training.
        tensors: how many the model has.
        keep: see ``Perturbation``.
        noise: whether any is added.
        evaluates: find every model as good as the last.
    """

    only_reads = True  # as what `flax_task` makes

    def __init__(
        self,
        size_bytes: int,
        seed: int,
        gate: Gate | None = None,
        *,
        tensors: int = TENSORS,
        keep: bool = True,
        noise: bool = True,
        evaluates: bool = False,
    ) -> None:
        self.num_examples = 100 + seed
        self._size_bytes, self._tensors, self._gate = size_bytes, tensors, gate
        self._perturb = Perturbation(seed, keep=keep) if noise else dict
        self._found = EvalResult(1.0, 1) if evaluates else None

    def init(self, seed: int) -> Weights:
        """See ``task.Task``."""
        return make_weights(self._size_bytes, seed, self._tensors)

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """See ``task.Task``; the time at the gate is no time of a round that counts."""
        if self._gate is not None:
            self._gate.enter()
        return TrainResult(self._perturb(weights), self.num_examples, {"loss": 1.0})

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """See ``task.Task``."""
        return self._found


def task(options: TaskOptions) -> Noop:
    """Make the task that ``--data`` describes."""
    told = dict(pair.split("=", 1) for pair in options.data.split(","))
    gate = Gate(told["gate"]) if "gate" in told else None
    tensors = int(told.get("tensors", TENSORS))
    return Noop(
        int(told["size"]),
        int(told.get("seed", 0)),
        gate,
        tensors=tensors,
        noise=told.get("noise") != "0",
        evaluates=told.get("evaluates") == "1",
    )
