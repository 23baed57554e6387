"""SCAFFOLD: control variates correct each gradient for the drift between workers."""

from __future__ import annotations

from typing import NamedTuple

from fluffle_common.errors import TaskError
from fluffle_worker.local.base import Named


class ControlVariates(NamedTuple):
    """The state of a training; arrays with the names and shapes of the tensors that travel."""

    server: Named  # ``c``, the mean of all workers' control variates, as broadcast
    own: Named  # ``c_k``, this worker's control variate; zeros at first
    mean: Named  # of the uncorrected gradients of the steps so far
    steps: int  # so far


class Scaffold:
    """Replaces each gradient ``g`` by ``g + c - c_k``, but not those of personal tensors.

    Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020. Option II of the paper sets the new ``c_k`` to ``c_k - c + (x - y) / (K η)``, where
    ``x`` and ``y`` are the weights before and after ``K`` steps of SGD with learning rate ``η``.
    That equals the mean of the ``K`` uncorrected gradients, which is computed here instead: it
    needs no learning rate and holds for any optimizer.
    """

    def begin(self, received: Named, broadcast: Named, kept: Named) -> ControlVariates:
        """Return the state from the broadcast and the kept control variates.

        Raises:
            TaskError: if nothing was broadcast. With its own control variate alone, the worker's
                corrected gradients would shrink to zero.
        """
        if not broadcast:
            raise TaskError(
                "the local rule 'scaffold' received no control variates from the coordinator; "
                "start the coordinator with --strategy scaffold, or train without this rule"
            )
        # A running mean of 16-bit values would soon be so large that a gradient no longer counts.
        zeros = {
            name: one.astype("float32") * 0 if one.itemsize < 4 else one * 0
            for name, one in received.items()
            if name in broadcast
        }
        server = {name: broadcast[name] for name in zeros}
        own = {name: kept.get(name, zero) for name, zero in zeros.items()}
        return ControlVariates(server, own, zeros, 0)

    def gradient(
        self, gradient: Named, weights: Named, state: ControlVariates
    ) -> tuple[Named, ControlVariates]:
        """Return the corrected gradient."""
        steps = state.steps + 1
        mean = {name: old + (gradient[name] - old) / steps for name, old in state.mean.items()}
        corrected = {
            name: gradient[name] + (c - state.own[name]) for name, c in state.server.items()
        }
        return {**gradient, **corrected}, state._replace(mean=mean, steps=steps)

    def end(self, trained: Named, state: ControlVariates) -> tuple[Named, Named]:
        """Keep the new ``c_k`` and send its change."""
        return state.mean, {name: one - state.own[name] for name, one in state.mean.items()}
