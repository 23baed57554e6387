"""Discounts: the factor on the weight of an update, as a function of its staleness.

The functions are those of Xie et al., "Asynchronous Federated Optimization", 2019, section 5.2;
FedBuff uses the polynomial with a = 0.5. All are 1 at staleness 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

# The functions of the staleness s by name, with their default arguments.
_KINDS: dict[str, tuple[Callable[..., float], tuple[float, ...]]] = {
    "constant": (lambda s: 1.0, ()),
    "polynomial": (lambda s, a: (1 + s) ** -a, (0.5,)),
    "hinge": (lambda s, a, b: 1.0 if s <= b else 1.0 / (a * (s - b) + 1.0), (10.0, 4.0)),
    "threshold": (lambda s, most: float(s <= most), (4.0,)),
}


@dataclass(frozen=True)
class Discount:
    """A discount function with its arguments.

    Example:
        >>> phi = Discount.parse("polynomial:0.5")
        >>> phi(0), phi(3)
        (1.0, 0.5)
        >>> Discount.parse("hinge:1,2")(4), Discount.parse("threshold:1")(2)
        (0.3333333333333333, 0.0)
    """

    kind: str = "polynomial"
    args: tuple[float, ...] = (0.5,)

    def __call__(self, staleness: int) -> float:
        """Return the factor, from 0 to 1."""
        return _KINDS[self.kind][0](staleness, *self.args)

    @classmethod
    def parse(cls, text: str) -> Discount:
        """Read ``constant``, ``polynomial[:a]``, ``hinge[:a,b]`` or ``threshold[:s]``.

        Raises:
            ValueError: if there is no such function, or its arguments are wrong.
        """
        kind, _, values = text.partition(":")
        with contextlib.suppress(KeyError, ValueError):
            default = _KINDS[kind][1]
            args = tuple(map(float, values.split(","))) if values else default
            if len(args) == len(default) and all(0 <= arg < math.inf for arg in args):
                return cls(kind, args)
        forms = ", ".join(str(cls(kind, args)) for kind, (_, args) in _KINDS.items())
        raise ValueError(
            f"invalid discount '{text[:60]}'; expected one of {forms}, with numbers of at least 0"
        )

    def __str__(self) -> str:
        """Return the text that ``parse`` reads."""
        args = ",".join(f"{arg:g}" for arg in self.args)
        return f"{self.kind}:{args}" if args else self.kind


POLYNOMIAL = Discount()
"""The default: 1 / sqrt(1 + s)."""
