"""``bf16``: the upper half of each float32, rounded to nearest, ties to even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fluffle_common.tensors.codecs.base import Part, Shape, clipped, plain
from fluffle_common.tensors.weights import BFLOAT16, Array, largest

_MAX = largest(BFLOAT16)


@dataclass(frozen=True, slots=True)
class Bf16:
    """See ``Codec``."""

    name: ClassVar[str] = "bf16"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    feeds_back: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str) -> Bf16:
        """See ``Codec``."""
        plain(text, cls.name)
        return cls()

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        """See ``Codec``."""
        bits = clipped(tensor, _MAX).astype(np.float32).view(np.uint32)
        odd = (bits >> 16) & 1  # half a step is added, less one bit where that makes a tie even
        return (((bits + (0x7FFF + odd)) >> 16).astype(np.uint16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        """See ``Codec``."""
        return (Part("", "uint16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        """See ``Codec``."""
        (halves,) = parts
        whole: Array = (halves.astype(np.uint32) << 16).view(np.float32)
        return whole.astype(like.dtype, copy=False)
