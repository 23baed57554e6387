"""The speed of simulated clients and of their connections, and the times when they are present."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Availability:
    """An on/off renewal process with exponentially distributed times present and away."""

    share: float = 1.0  # of the time that a client is present, in (0, 1]; 1 means always
    present_s: float = float("inf")  # the mean time that it stays

    def begin(self, rng: np.random.Generator) -> bool:
        """Draw whether a client is present at the start of the simulation."""
        return bool(rng.random() < self.share)

    def spells(self, rng: np.random.Generator, *, present: bool) -> Iterator[float]:
        """Yield the seconds until a client's next change, alternately present and away, forever.

        ``present`` says whether the client is present first.
        """
        if self.share == 1:
            return
        mean_s = {True: self.present_s, False: self.present_s * (1 / self.share - 1)}
        while True:
            yield float(rng.exponential(mean_s[present]))
            present = not present


ALWAYS = Availability()


def parse_availability(text: str) -> Availability:
    """Return the availability that ``always`` or ``FRACTION:SECONDS`` describes.

    Example:
        >>> parse_availability("0.25:600")
        Availability(share=0.25, present_s=600.0)

    Raises:
        UsageError: if ``text`` is neither.
    """
    if text == "always":
        return ALWAYS
    try:
        share, present_s = map(float, text.split(":"))
    except ValueError:
        share = present_s = 0.0
    if not (0 < share < 1 and 0 < present_s < float("inf")):
        raise UsageError(
            f"invalid availability '{text}'; give 'always', or FRACTION:SECONDS such as 0.8:3600 "
            "(clients are present 80 % of the time, and stay for 3600 s on average)"
        )
    return Availability(share, present_s)
