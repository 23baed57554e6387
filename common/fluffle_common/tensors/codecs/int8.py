"""``int8``: 8-bit integers, with one scale for each block of 256 values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fluffle_common.tensors.codecs.base import Part, Shape, clipped, plain
from fluffle_common.tensors.weights import FLOATS, Array, NotFinite, largest

BLOCK = 256  # values that share a scale
_INT8_MAX = 127
_F32_MAX = largest(np.dtype(np.float32))


@dataclass(frozen=True, slots=True)
class Int8:
    """See ``Codec``."""

    name: ClassVar[str] = "int8"
    dtypes: ClassVar[tuple[str, ...]] = FLOATS
    feeds_back: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> Int8:
        """See ``Codec``."""
        plain(text, cls.name)
        return cls()

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        """See ``Codec``."""
        padded = np.zeros(_blocks(tensor.size) * BLOCK, np.float32)
        padded[: tensor.size] = clipped(tensor.reshape(-1), _F32_MAX)
        blocks = padded.reshape(-1, BLOCK)
        scale = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(_INT8_MAX)
        # A block of zeros has scale 0; and a scale too small to be exact must not lead beyond 127.
        blocks /= np.where(scale > 0, scale, np.float32(1))[:, None]
        whole = np.clip(np.rint(blocks, out=blocks), -_INT8_MAX, _INT8_MAX, out=blocks)
        return whole.astype(np.int8).reshape(-1)[: tensor.size].reshape(tensor.shape), scale

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        """See ``Codec``."""
        scales = (_blocks(math.prod(shape)),)
        return Part("#q", "int8", shape), Part("#scale", "float32", scales)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        """See ``Codec``."""
        q, scale = parts
        bad = int(scale.size - np.isfinite(scale).sum())
        if bad:
            raise NotFinite(f"#scale has {bad} values that are NaN or infinite")
        if scale.size and scale.min() < 0:
            raise ValueError("#scale has negative values")
        decoded = np.empty(like.shape, like.dtype)
        flat, into = q.reshape(-1), decoded.reshape(-1)
        whole = like.size - like.size % BLOCK
        np.multiply(
            flat[:whole].reshape(-1, BLOCK),
            scale[: whole // BLOCK, None],
            out=into[:whole].reshape(-1, BLOCK),
            casting="same_kind",
        )
        if whole < like.size:
            np.multiply(flat[whole:], scale[-1], out=into[whole:], casting="same_kind")
        return decoded


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
