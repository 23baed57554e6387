"""The speed of simulated clients: of their computation and of their network connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.weights import Array


@dataclass(frozen=True)
class Device:
    """The speed of one client.

    Args:
        step_s: the time of one training step, in seconds.
        fit_s: the fixed time that each training takes in addition, in seconds.
        bytes_per_s: the bandwidth of its connection, in either direction; infinite by default.
    """

    step_s: float = 0.0
    fit_s: float = 0.0
    bytes_per_s: float = float("inf")

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: if one is not a number, below 0 or not finite, or the bandwidth is 0.
        """
        for name in ("step_s", "fit_s"):
            if not (_is_non_negative(getattr(self, name)) and getattr(self, name) < float("inf")):
                raise UsageError(
                    f"Device({name}={getattr(self, name)}) is not valid; expected a number of at "
                    "least 0"
                )
        if not (_is_non_negative(self.bytes_per_s) and self.bytes_per_s > 0):
            raise UsageError(
                f"Device(bytes_per_s={self.bytes_per_s}) is not valid; expected a number above 0"
            )


def _is_non_negative(value: object) -> bool:
    return isinstance(value, Real) and float(value) >= 0


_DISTRIBUTIONS: dict[str, tuple[int | None, Callable[..., Array]]] = {
    "constant": (1, lambda rng, n, value: np.full(n, value)),
    "classes": (None, lambda rng, n, *values: np.resize(np.array(values), n)),
    "lognormal": (2, lambda rng, n, median, s: median * np.exp(s * rng.standard_normal(n))),
    "uniform": (2, lambda rng, n, *limits: rng.uniform(*sorted(limits), n)),
}
"""By kind, the number of its parameters, None for any, and how values for n clients are drawn."""


def draw(distribution: float | str, rng: np.random.Generator, clients: int) -> Array:
    """Draw a quantity for each client.

    Args:
        distribution: a number or ``constant:V`` is the same for all; ``classes:A,B,C`` assigns the
            values in turn; ``lognormal:MEDIAN,SIGMA`` puts most near the median and a few far above
            it; ``uniform:LOW,HIGH`` draws from an interval.
        rng: the source of randomness.
        clients: the number of clients.

    Raises:
        UsageError: if it is not a distribution.
    """
    text = str(distribution)
    kind, given = text.split(":", 1) if ":" in text else ("constant", text)
    number, make = _DISTRIBUTIONS.get(kind, (0, None))
    try:
        values = [float(one) for one in given.split(",")]
    except ValueError:
        values = []
    fits = bool(values) and number in (None, len(values))
    if make is None or not fits or not all(0 <= value < float("inf") for value in values):
        raise UsageError(
            f"invalid distribution '{text}'; use one of: a number; classes:A,B,C; "
            "lognormal:MEDIAN,SIGMA; uniform:LOW,HIGH (all numbers must be at least 0)"
        )
    return np.asarray(make(rng, clients, *values))


def devices(
    clients: int,
    *,
    step_s: float | str = 0.01,
    fit_s: float | str = 0,
    bytes_per_s: float | str | None = None,
    seed: int = 0,
) -> list[Device]:
    """Return a device for each client; the same seed gives the same devices.

    The arguments are distributions of the fields of ``Device``, as for ``draw``; None means
    infinite.

    Raises:
        UsageError: if one is not a distribution, or a bandwidth is 0.
    """
    rng = np.random.default_rng([seed, clients])
    steps, fits = draw(step_s, rng, clients), draw(fit_s, rng, clients)
    lines = np.full(clients, np.inf)
    if bytes_per_s is not None:
        lines = draw(bytes_per_s, rng, clients)
        if not np.all(lines > 0):
            raise UsageError(
                f"invalid bandwidth '{bytes_per_s}'; give more than 0 bytes per second"
            )
    return [Device(*map(float, one)) for one in zip(steps, fits, lines, strict=True)]
