"""``int8``: 8-bit integers with one float32 scale per block of 256 values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.codecs.base import Codec, Part, Shape, clip_to
from fluffle_common.tensors.weights import FLOATS, Array, largest, not_finite

BLOCK = 256  # values that share a scale
_INT8_MAX = 127
# The scale of the largest float32 is rounded up, so that 127 times the scale is infinite.
_MAX = float(np.nextafter(np.float32(largest(np.dtype(np.float32))), np.float32(0)))


@dataclass(frozen=True, slots=True)
class Int8(Codec):
    """The codec ``int8``; see ``Codec``."""

    name = "int8"
    dtypes = FLOATS
    feeds_back = True

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        padded = np.zeros(_blocks(tensor.size) * BLOCK, np.float32)
        padded[: tensor.size] = clip_to(tensor.reshape(-1), _MAX)
        blocks = padded.reshape(-1, BLOCK)
        scale = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(_INT8_MAX)
        blocks /= np.where(scale > 0, scale, np.float32(1))[:, None]
        # A subnormal scale is inexact, so that a quotient may exceed 127.
        q = np.clip(np.rint(blocks, out=blocks), -_INT8_MAX, _INT8_MAX, out=blocks)
        return q.astype(np.int8).reshape(-1)[: tensor.size].reshape(tensor.shape), scale

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        scales = (_blocks(math.prod(shape)),)
        return Part("#q", "int8", shape), Part("#scale", "float32", scales)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        q, scale = parts
        bad = int(scale.size - np.isfinite(scale).sum())
        if bad:
            raise not_finite("#scale", bad)
        if scale.size and scale.min() < 0:
            raise ValueError("the part '#scale' has negative values")
        decoded = np.empty(like.shape, like.dtype)
        flat, out = q.reshape(-1), decoded.reshape(-1)
        full = like.size - like.size % BLOCK  # values in full blocks
        np.multiply(
            flat[:full].reshape(-1, BLOCK),
            scale[: full // BLOCK, None],
            out=out[:full].reshape(-1, BLOCK),
            casting="same_kind",
        )
        if full < like.size:
            np.multiply(flat[full:], scale[-1], out=out[full:], casting="same_kind")
        return decoded


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
