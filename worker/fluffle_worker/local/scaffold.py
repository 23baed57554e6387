"""SCAFFOLD: each gradient is corrected by how this worker's gradients differ from all workers'."""

from __future__ import annotations

from typing import NamedTuple

from fluffle_common.errors import TaskError
from fluffle_worker.local.base import Named


class ControlVariates(NamedTuple):
    """What a training goes along with; named arrays in the shapes of the model's tensors.

    Args:
        server: ``c``, the mean of all workers' control variates, as broadcast.
        own: ``c_k``, this worker's, as it kept it; zeros at first.
        mean: the mean gradient of the steps so far, before the correction.
        steps: how many there were.
    """

    server: Named
    own: Named
    mean: Named
    steps: int


class Scaffold:
    """Uses ``g + c - c_k`` in place of each gradient ``g``.

    From Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020. Its option II sets the new ``c_k`` to ``c_k - c + (x - y) / (K η)``, of the weights
    before and after ``K`` steps of SGD. That is the mean of the ``K`` gradients, which is what is
    kept here: it needs no learning rate, and is the same under any optimizer.
    """

    def begin(self, received: Named, broadcast: Named, kept: Named) -> ControlVariates:
        """See ``LocalRule``.

        Raises:
            TaskError: if nothing is broadcast: by the worker's own variate alone, it would learn to
                stand still.
        """
        if not broadcast:
            raise TaskError(
                "the local rule 'scaffold' gets no control variates from the coordinator; let it "
                "run with --strategy scaffold, or train without this rule"
            )
        zeros = {name: one * 0 for name, one in received.items()}
        server = {name: broadcast.get(name, zero) for name, zero in zeros.items()}
        own = {name: kept.get(name, zero) for name, zero in zeros.items()}
        return ControlVariates(server, own, zeros, 0)

    def gradient(
        self, gradient: Named, weights: Named, state: ControlVariates
    ) -> tuple[Named, ControlVariates]:
        """See ``LocalRule``."""
        steps = state.steps + 1
        mean = {name: old + (gradient[name] - old) / steps for name, old in state.mean.items()}
        corrected = {
            name: one + (state.server[name] - state.own[name]) for name, one in gradient.items()
        }
        return corrected, state._replace(mean=mean, steps=steps)

    def end(self, trained: Named, state: ControlVariates) -> tuple[Named, Named]:
        """See ``LocalRule``; kept is the new ``c_k``, and sent by how much it changed."""
        return state.mean, {name: one - state.own[name] for name, one in state.mean.items()}
