"""``f16``: each value as a float16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.codecs.base import Codec, Part, Shape, clip_to
from fluffle_common.tensors.weights import Array, largest

_MAX = largest(np.dtype(np.float16))


@dataclass(frozen=True, slots=True)
class F16(Codec):
    """The codec ``f16``; see ``Codec``."""

    name = "f16"
    dtypes = ("float32", "float64")
    feeds_back = False

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        return (clip_to(tensor, _MAX).astype(np.float16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        return (Part("", "float16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        (halves,) = parts
        return halves.astype(like.dtype)
