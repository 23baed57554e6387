"""Federated averaging, the default strategy.

Example:
    >>> import numpy as np
    >>> from fluffle_coordinator.strategy.base import Contribution
    >>> base = {"w": np.zeros(2, np.float32)}
    >>> state = fedavg.init(base)
    >>> for learnt, n in (([1, 2], 1), ([4, 8], 2)):
    ...     delta = {"w": np.array(learnt, np.float32)}
    ...     state = fedavg.fold(state, Contribution(worker="a", num_examples=n, delta=delta))
    >>> weights, state = fedavg.finish(state, base)
    >>> weights["w"]
    array([3., 6.], dtype=float32)
"""

from __future__ import annotations

from fluffle_coordinator.strategy.base import NamedStrategy
from fluffle_coordinator.strategy.pipeline import pipeline, replace
from fluffle_coordinator.strategy.weighted import weighted

fedavg = pipeline(mean=weighted(), server=replace())
"""The average weighted by numbers of examples, sum(n_k * w_k) / sum(n_k), summed in float64.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, algorithm 1, on deltas: w + sum(n_k * (w_k - w)) / sum(n_k). Integer tensors are
averaged exactly and rounded to nearest, halves to even. Values saturate at the ends of their dtype,
so finite updates give a finite model.
"""

FEDAVG = NamedStrategy("fedavg", fedavg, ours=True)
"""The default strategy of a run."""
