"""When the simulated clients are present: always, or on and off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fluffle_common.errors import UsageError


@dataclass(frozen=True)
class Availability:
    """An on/off renewal process: the times present and the times away are exponential.

    Args:
        share: the part of the time that a client is present, in (0, 1]; 1: it never leaves.
        present_s: how many seconds it stays on average.
    """

    share: float = 1.0
    present_s: float = float("inf")

    def begin(self, rng: np.random.Generator) -> bool:
        """Draw whether a client is present when the simulation begins."""
        return bool(rng.random() < self.share)

    def spells(self, rng: np.random.Generator, *, present: bool) -> Iterator[float]:
        """Yield how many seconds a client stays, is away, stays, and so on, without end.

        Args:
            rng: the client's own.
            present: whether it is there at first.
        """
        if self.share == 1:
            return
        mean_s = {True: self.present_s, False: self.present_s * (1 / self.share - 1)}
        while True:
            yield float(rng.exponential(mean_s[present]))
            present = not present


ALWAYS = Availability()


def parse_availability(text: str) -> Availability:
    """Return the availability of ``always`` or ``SHARE:SECONDS``.

    Example:
        >>> parse_availability("0.25:600")
        Availability(share=0.25, present_s=600.0)

    Raises:
        UsageError: if it is neither.
    """
    if text == "always":
        return ALWAYS
    try:
        share, present_s = map(float, text.split(":"))
    except ValueError:
        share = present_s = 0.0
    if not (0 < share < 1 and 0 < present_s < float("inf")):
        raise UsageError(
            f"'{text}' is no availability: 'always' or SHARE:SECONDS is expected, the share of the "
            "time that a client is present, between 0 and 1, and how long it stays on average, "
            "such as 0.8:3600"
        )
    return Availability(share, present_s)
