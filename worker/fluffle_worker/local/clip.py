"""Gradient clipping by global norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluffle_worker.local.base import Named, Plain, check_number

_TINY = 1e-30  # avoids a division by 0; representable as float32


@dataclass(frozen=True)
class Clip(Plain):
    """Scales all tensors of a gradient by one factor so that its norm is at most ``norm``.

    The norm is the Euclidean norm over all tensors. Source: Pascanu et al., "On the difficulty of
    training recurrent neural networks", ICML 2013.

    Args:
        norm: the largest norm of a gradient.

    Raises:
        UsageError: if ``norm`` is not above 0, or not finite.
    """

    norm: float

    def __post_init__(self) -> None:
        """Check the setting."""
        check_number("clip", "norm", self.norm)

    def gradient(self, gradient: Named, weights: Named, state: Any) -> tuple[Named, Any]:
        """Return the clipped gradient."""
        # The squares of 16-bit values would overflow.
        wide = [one.astype("float32") if one.itemsize < 4 else one for one in gradient.values()]
        length = sum((one * one).sum() for one in wide) ** 0.5
        factor = (self.norm / (length + _TINY)).clip(max=1)
        return {name: (one * factor).astype(one.dtype) for name, one in gradient.items()}, None
