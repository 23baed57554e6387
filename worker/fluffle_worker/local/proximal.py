"""FedProx: a proximal term that pulls towards the received weights."""

from __future__ import annotations

from dataclasses import dataclass

from fluffle_worker.local.base import Named, Plain, check_number


@dataclass(frozen=True)
class Proximal(Plain):
    """Adds ``mu * (w - w0)`` to each gradient, the gradient of ``mu / 2 * |w - w0|²``.

    This limits how far workers with different data drift apart over many local steps. Source: Li et
    al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, which uses ``mu`` from
    0.001 to 1.

    Args:
        mu: the strength of the pull; 0 changes nothing.

    Raises:
        UsageError: if ``mu`` is negative or not finite.

    >>> rule = Proximal(0.5)
    >>> rule.gradient({"w": 1.0}, {"w": 3.0}, rule.begin({"w": 1.0}, {}, {}))[0]
    {'w': 2.0}
    """

    mu: float

    def __post_init__(self) -> None:
        """Check the setting."""
        check_number("proximal", "mu", self.mu, zero=True)

    def begin(self, received: Named, broadcast: Named, kept: Named) -> Named:
        """Return the received weights as the state."""
        return received

    def gradient(self, gradient: Named, weights: Named, state: Named) -> tuple[Named, Named]:
        """Return the gradient with the proximal term added."""
        pulled = {
            name: one + self.mu * (weights[name] - state[name]) for name, one in gradient.items()
        }
        return pulled, state
