"""Clipping: no gradient is longer than a norm."""

from __future__ import annotations

from dataclasses import dataclass

from fluffle_worker.local.base import Named, check_number

_TINY = 1e-30  # no gradient of norm 0 is divided by it; a float32 can hold it


@dataclass(frozen=True)
class Clip:
    """Scales a gradient down to a norm, if it is longer: all its tensors by one factor.

    The norm is the Euclidean one of all tensors together. From Pascanu et al., "On the difficulty
    of training recurrent neural networks", ICML 2013.

    Args:
        norm: the longest that a gradient may be.

    Raises:
        UsageError: if ``norm`` is not above 0, or not finite.
    """

    norm: float

    def __post_init__(self) -> None:
        """Check the setting."""
        check_number("clip", "norm", self.norm)

    def begin(self, received: Named, broadcast: Named, kept: Named) -> None:
        """See ``LocalRule``; there is no state."""

    def gradient(self, gradient: Named, weights: Named, state: None) -> tuple[Named, None]:
        """See ``LocalRule``."""
        length = sum((one * one).sum() for one in gradient.values()) ** 0.5
        factor = (self.norm / (length + _TINY)).clip(max=1)
        return {name: (one * factor).astype(one.dtype) for name, one in gradient.items()}, None

    def end(self, trained: Named, state: None) -> Named:
        """See ``LocalRule``."""
        return {}
