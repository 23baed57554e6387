"""``bf16``: the upper half of each float32, rounded to nearest, ties to even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fluffle_common.tensors.codecs.base import Part, Shape, check_no_settings, clip_to
from fluffle_common.tensors.weights import BFLOAT16, Array, largest

_MAX = largest(BFLOAT16)


@dataclass(frozen=True, slots=True)
class Bf16:
    """The codec ``bf16``; see ``Codec``."""

    name: ClassVar[str] = "bf16"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    feeds_back: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str) -> Bf16:
        """Return the codec; it takes no settings."""
        check_no_settings(text, cls.name)
        return cls()

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        """Return the upper halves of the values as float32."""
        bits = clip_to(tensor, _MAX).astype(np.float32).view(np.uint32)
        odd = (bits >> 16) & 1  # breaks ties towards even
        return (((bits + (0x7FFF + odd)) >> 16).astype(np.uint16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        """Return the parts of a tensor of this shape."""
        return (Part("", "uint16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        """Return the tensor, with zeros in the lower halves of the values."""
        (halves,) = parts
        decoded: Array = (halves.astype(np.uint32) << 16).view(np.float32)
        return decoded.astype(like.dtype, copy=False)
