"""How quick the simulated clients are, and what their lines carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.weights import Array


@dataclass(frozen=True)
class Device:
    """One client's.

    Args:
        step_s: seconds that one training step takes.
        round_s: seconds that a training takes besides, however many steps it has.
        bytes_per_s: what its line carries, either way; infinity where that takes no time.
    """

    step_s: float = 0.0
    round_s: float = 0.0
    bytes_per_s: float = float("inf")

    def moving_s(self, nbytes: int) -> float:
        """Return how long its line is busy with so many bytes."""
        return nbytes / self.bytes_per_s

    def training_s(self, steps: int) -> float:
        """Return how long it trains."""
        return self.round_s + steps * self.step_s


@dataclass(frozen=True)
class Spread:
    """How a quantity differs from client to client.

    ``constant:V``: the same for all; ``classes:A,B,C``: each client is of one class, in turn;
    ``lognormal:MEDIAN,SIGMA``: most near the median, a few far above it; ``uniform:LOW,HIGH``.
    """

    text: str
    draw: Callable[[np.random.Generator, int], Array]


def parse_spread(text: str) -> Spread:
    """Return the spread that a text names; a number alone is ``constant``.

    Raises:
        UsageError: where it names none.
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
            f"'{text}' is not a distribution; use a number, classes:A,B,C, "
            "lognormal:MEDIAN,SIGMA or uniform:LOW,HIGH, with numbers from 0 up"
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
            return Spread(text, lambda rng, n: rng.uniform(low, high, n))


def devices(
    clients: int,
    *,
    step_s: str = "0.01",
    round_s: str = "0",
    bytes_per_s: str | None = None,
    seed: int = 0,
) -> list[Device]:
    """Return a device for each client; the same for the same seed.

    Args:
        clients: how many.
        step_s: see ``Device``, as a spread.
        round_s: likewise.
        bytes_per_s: likewise; None: lines take no time.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, clients])
    steps = parse_spread(step_s).draw(rng, clients)
    rounds = parse_spread(round_s).draw(rng, clients)
    lines = np.full(clients, np.inf)
    if bytes_per_s is not None:
        lines = parse_spread(bytes_per_s).draw(rng, clients)
        if not np.all(lines > 0):
            raise UsageError(
                f"a connection of {bytes_per_s} bytes a second carries nothing; "
                "give a speed above 0"
            )
    return [Device(*map(float, one)) for one in zip(steps, rounds, lines, strict=True)]
