"""When simulated clients are present: always, or intermittently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fluffle_common.errors import UsageError


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
