"""A task that does almost nothing, so that everything else is measured.

    fluffle worker --task benchmarks.noop:task --data size=10000000,gate=/tmp/x,seed=1

``--data`` takes these settings:

``size``       the size of the model in bytes
``tensors``    the number of its tensors (8)
``gate``       the socket of the benchmark, see ``gate``; without it, the worker never waits
``seed``       the seed of the worker's noise (0)
``noise``      with 0, training returns the received weights unchanged (1)
``evaluates``  with 1, the worker returns an evaluation at once (0)
"""

from __future__ import annotations

from benchmarks.arrays import TENSORS, Perturbation, make_weights
from benchmarks.round_gate import Gate
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights
from fluffle_worker.task import EvalResult, Progress, TaskOptions, TrainResult


class Noop:
    """Adds noise to the received weights instead of training.

    Args:
        size_bytes: the size of the model.
        seed: the seed of the noise.
        gate: the gate to enter before each training.
        tensors: the number of tensors.
        keep: see ``Perturbation``.
        noise: whether to add noise.
        evaluates: whether to return an evaluation, the same for every model.
    """

    only_reads = True  # like the tasks of `flax_task`

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
        self._evaluation = EvalResult(1.0, 1) if evaluates else None

    def init(self, seed: int) -> Weights:
        """Return random weights."""
        return make_weights(self._size_bytes, seed, self._tensors)

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """Wait at the gate, then return perturbed weights."""
        if self._gate is not None:
            self._gate.enter()
        return TrainResult(self._perturb(weights), self.num_examples, {"loss": 1.0})

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Return the fixed evaluation, if any."""
        return self._evaluation


def task(options: TaskOptions) -> Noop:
    """Return the task that ``--data`` describes."""
    settings = dict(pair.split("=", 1) for pair in options.data.split(","))
    gate = Gate(settings["gate"]) if "gate" in settings else None
    tensors = int(settings.get("tensors", TENSORS))
    return Noop(
        int(settings["size"]),
        int(settings.get("seed", 0)),
        gate,
        tensors=tensors,
        noise=settings.get("noise") != "0",
        evaluates=settings.get("evaluates") == "1",
    )
