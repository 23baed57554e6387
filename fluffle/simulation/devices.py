"""The speed of simulated clients: of their computation and of their network connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.weights import Array


@dataclass(frozen=True)
class Device:
    """The speed of one client.

    Args:
        step_s: the time of one training step, in seconds.
        round_s: the fixed time that each training takes in addition, in seconds.
        bytes_per_s: the bandwidth of its connection, in either direction; infinite by default.
    """

    step_s: float = 0.0
    round_s: float = 0.0
    bytes_per_s: float = float("inf")

    def moving_s(self, nbytes: int) -> float:
        """Return the seconds that it takes to transfer ``nbytes``."""
        return nbytes / self.bytes_per_s

    def training_s(self, steps: int) -> float:
        """Return the seconds that a training of ``steps`` steps takes."""
        return self.round_s + steps * self.step_s


@dataclass(frozen=True)
class Spread:
    """The distribution of a quantity over the clients.

    ``constant:V`` is the same for all; ``classes:A,B,C`` assigns the values in turn;
    ``lognormal:MEDIAN,SIGMA`` puts most near the median and a few far above it;
    ``uniform:LOW,HIGH`` draws from an interval.
    """

    text: str
    draw: Callable[[np.random.Generator, int], Array]


def parse_spread(text: str) -> Spread:
    """Return the distribution that a text describes; a number alone is ``constant``.

    Raises:
        UsageError: if it describes none.
    """
    kind, colon, given = text.partition(":")
    if not colon:
        kind, given = "constant", text
    try:
        values = [float(one) for one in given.split(",")]
    except ValueError:
        values = []
    known = {"constant": 1, "classes": None, "lognormal": 2, "uniform": 2}
    number = known.get(kind, 0)
    fits = len(values) == number if number else bool(values) and kind in known
    if not fits or not all(0 <= value < float("inf") for value in values):
        raise UsageError(
            f"invalid distribution '{text}'; use a number, classes:A,B,C, lognormal:MEDIAN,SIGMA "
            "or uniform:LOW,HIGH, with numbers of at least 0"
        )
    match kind:
        case "constant":
            return Spread(text, lambda _, n: np.full(n, values[0]))
        case "classes":
            return Spread(text, lambda _, n: np.resize(np.array(values), n))
        case "lognormal":
            median, sigma = values
            return Spread(text, lambda rng, n: median * np.exp(sigma * rng.standard_normal(n)))
        case _:
            low, high = values
            if low > high:
                raise UsageError(
                    f"invalid distribution '{text}': LOW is above HIGH; use "
                    f"uniform:{high:g},{low:g}"
                )
            return Spread(text, lambda rng, n: rng.uniform(low, high, n))


def devices(
    clients: int,
    *,
    step_s: str = "0.01",
    round_s: str = "0",
    bytes_per_s: str | None = None,
    seed: int = 0,
) -> list[Device]:
    """Return a device for each client; the same seed gives the same devices.

    Args:
        clients: the number of clients.
        step_s: the distribution of ``Device.step_s``; see ``Spread``.
        round_s: the distribution of ``Device.round_s``.
        bytes_per_s: the distribution of ``Device.bytes_per_s``; None means infinite.
        seed: the seed of the draws.

    Raises:
        UsageError: if a text is not a distribution, or a bandwidth is 0.
    """
    rng = np.random.default_rng([seed, clients])
    steps = parse_spread(step_s).draw(rng, clients)
    rounds = parse_spread(round_s).draw(rng, clients)
    lines = np.full(clients, np.inf)
    if bytes_per_s is not None:
        lines = parse_spread(bytes_per_s).draw(rng, clients)
        if not np.all(lines > 0):
            raise UsageError(f"the bandwidth must be above 0 bytes per second, not {bytes_per_s}")
    return [Device(*map(float, one)) for one in zip(steps, rounds, lines, strict=True)]
