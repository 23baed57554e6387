"""Federated learning over a message broker: the public Python API.

``fluffle.run`` runs a federation, in this process or over RabbitMQ; ``fluffle.simulate`` simulates
one; ``fluffle.Run`` opens the folder of any run. Names load lazily, so the import is fast and needs
no optional dependency: only ``flax_task``, for example, imports JAX.

Example:
    >>> import fluffle
    >>> import numpy as np
    >>> class Mean:
    ...     '''Learns the mean of its numbers.'''
    ...     def __init__(self, numbers):
    ...         self.numbers, self.num_examples = np.array(numbers), len(numbers)
    ...     def init(self, seed):
    ...         return {"mean": np.zeros(())}
    ...     def train(self, weights, plan, progress):
    ...         return fluffle.TrainResult({"mean": self.numbers.mean()}, self.num_examples)
    ...     def evaluate(self, weights):
    ...         error = self.numbers - weights["mean"]
    ...         return fluffle.EvalResult(float((error**2).mean()), self.num_examples)
    >>> done = fluffle.run([Mean([1.0, 2.0, 3.0]), Mean([10.0])], rounds=2)
    >>> float(done.weights["mean"]), done.history["loss"]
    (4.0, [12.5, 12.5])
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluffle.history import History as History
    from fluffle.history import Round as Round
    from fluffle.local import arun as arun
    from fluffle.local import run as run
    from fluffle.models import load_into as load_into
    from fluffle.models import load_model as load_model
    from fluffle.models import save_model as save_model
    from fluffle.results import Run as Run
    from fluffle.simulation.devices import Device as Device
    from fluffle.simulation.local import simulate as simulate
    from fluffle.simulation.plot import plot_partition as plot_partition
    from fluffle_common.errors import BrokerError as BrokerError
    from fluffle_common.errors import FluffleError as FluffleError
    from fluffle_common.errors import RefusedError as RefusedError
    from fluffle_common.errors import RunError as RunError
    from fluffle_common.errors import TaskError as TaskError
    from fluffle_common.errors import UsageError as UsageError
    from fluffle_common.protocol.messages import Plan as Plan
    from fluffle_common.tensors.weights import Weights as Weights
    from fluffle_coordinator.strategy.base import Contribution as Contribution
    from fluffle_coordinator.strategy.base import Needs as Needs
    from fluffle_coordinator.strategy.base import Strategy as Strategy
    from fluffle_coordinator.strategy.fedavg import fedavg as fedavg
    from fluffle_coordinator.strategy.pipeline import pipeline as pipeline
    from fluffle_coordinator.strategy.pipeline import replace as replace
    from fluffle_coordinator.strategy.weighted import weighted as weighted
    from fluffle_coordinator.user_code.hooks import Commit as Commit
    from fluffle_coordinator.user_code.hooks import StopRun as StopRun
    from fluffle_worker.task import EvalResult as EvalResult
    from fluffle_worker.task import Progress as Progress
    from fluffle_worker.task import RoundPlan as RoundPlan
    from fluffle_worker.task import Task as Task
    from fluffle_worker.task import TaskOptions as TaskOptions
    from fluffle_worker.task import TrainResult as TrainResult
    from fluffle_worker.tasks.examples import accuracy as accuracy
    from fluffle_worker.tasks.flax import flax_task as flax_task
    from fluffle_worker.tasks.sklearn import sklearn_task as sklearn_task
    from fluffle_worker.tasks.torch import torch_task as torch_task

_NAMES = {
    "fluffle.history": "History Round",
    "fluffle.local": "arun run",
    "fluffle.models": "load_into load_model save_model",
    "fluffle.results": "Run",
    "fluffle.simulation.devices": "Device",
    "fluffle.simulation.local": "simulate",
    "fluffle.simulation.plot": "plot_partition",
    "fluffle_common.errors": "BrokerError FluffleError RefusedError RunError TaskError UsageError",
    "fluffle_common.protocol.messages": "Plan",
    "fluffle_common.tensors.weights": "Weights",
    "fluffle_coordinator.user_code.hooks": "Commit StopRun",
    "fluffle_coordinator.strategy.base": "Contribution Needs Strategy",
    "fluffle_coordinator.strategy.fedavg": "fedavg",
    "fluffle_coordinator.strategy.pipeline": "pipeline replace",
    "fluffle_coordinator.strategy.weighted": "weighted",
    "fluffle_worker.task": "EvalResult Progress RoundPlan Task TaskOptions TrainResult",
    "fluffle_worker.tasks.examples": "accuracy",
    "fluffle_worker.tasks.flax": "flax_task",
    "fluffle_worker.tasks.sklearn": "sklearn_task",
    "fluffle_worker.tasks.torch": "torch_task",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

# Names that need an optional package: its module, and what pip installs. If it is missing, __all__
# and dir() leave them out, so that "from fluffle import *" and help(fluffle), which load each name,
# work.
_PACKAGES = {
    "flax_task": ("flax", "'fluffle[worker]'"),
    "sklearn_task": ("sklearn", "scikit-learn"),
    "torch_task": ("torch", "'fluffle[torch]'"),
}


def __getattr__(name: str) -> Any:
    """Load a name of the public API when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fluffle")
    if name == "__all__":
        missing = {one for one, (package, _) in _PACKAGES.items() if not find_spec(package)}
        return sorted(_MODULES.keys() - missing)
    if name not in _MODULES:
        raise AttributeError(f"module 'fluffle' has no attribute '{name}'")
    try:
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as why:
        if name not in _PACKAGES:
            raise
        text = f"{name} needs the module '{why.name}'; run pip install {_PACKAGES[name][1]}"
        raise ModuleNotFoundError(text, name=why.name) from None
    return value


def __dir__() -> list[str]:
    """Return the names of the public API, and those that every module has."""
    return sorted({*__getattr__("__all__"), *(name for name in globals() if name[:2] == "__")})
