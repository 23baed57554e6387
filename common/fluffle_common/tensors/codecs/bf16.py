"""``bf16``: the upper half of each float32, rounded to nearest, ties to even."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.codecs.base import Codec, Part, Shape, clip_to
from fluffle_common.tensors.weights import BFLOAT16, Array, largest

_MAX = largest(BFLOAT16)


@dataclass(frozen=True, slots=True)
class Bf16(Codec):
    """The codec ``bf16``; see ``Codec``."""

    name = "bf16"
    dtypes = ("float32", "float64")
    feeds_back = False

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        return (clip_to(tensor, _MAX).astype(np.float32).astype(BFLOAT16).view(np.uint16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        return (Part("", "uint16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        (halves,) = parts
        decoded: Array = halves.view(BFLOAT16).astype(like.dtype)
        return decoded
