"""The built-in codecs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.codecs.base import Codec, Part, Shape, clip_to
from fluffle_common.tensors.weights import BFLOAT16, FLOATS, Array, largest, not_finite

BLOCK = 256  # values that share a scale
_INT8_MAX = 127
_BF16_MAX, _F16_MAX = largest(BFLOAT16), largest(np.dtype(np.float16))
_F32_MAX = largest(np.dtype(np.float32))
# The scale of the largest float32 is rounded up, so that 127 times the scale is infinite.
_INT8_INPUT_MAX = float(np.nextafter(np.float32(_F32_MAX), np.float32(0)))


@dataclass(frozen=True, slots=True)
class Bf16(Codec):
    """The upper half of each float32, rounded to nearest, ties to even."""

    name = "bf16"
    dtypes = ("float32", "float64")
    feeds_back = False

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        return (clip_to(tensor, _BF16_MAX).astype(np.float32).astype(BFLOAT16).view(np.uint16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        return (Part("", "uint16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        (halves,) = parts
        decoded: Array = halves.view(BFLOAT16).astype(like.dtype)
        return decoded


@dataclass(frozen=True, slots=True)
class F16(Codec):
    """Each value as a float16."""

    name = "f16"
    dtypes = ("float32", "float64")
    feeds_back = False

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        return (clip_to(tensor, _F16_MAX).astype(np.float16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        return (Part("", "float16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        (halves,) = parts
        return halves.astype(like.dtype)


@dataclass(frozen=True, slots=True)
class Int8(Codec):
    """8-bit integers, and one float32 scale per block of 256 values."""

    name = "int8"
    dtypes = FLOATS
    feeds_back = True

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        padded = np.zeros(_blocks(tensor.size) * BLOCK, np.float32)
        padded[: tensor.size] = clip_to(tensor.reshape(-1), _INT8_INPUT_MAX)
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


@dataclass(frozen=True, slots=True)
class TopK(Codec):
    """The ``fraction`` of the values with the largest magnitudes, and their flat indices."""

    fraction: float
    name = "topk"
    dtypes = FLOATS
    feeds_back = True

    @classmethod
    def parse(cls, text: str) -> TopK:
        """Return the codec with the fraction in the text.

        >>> TopK.parse("topk:0.01")
        TopK(fraction=0.01)
        """
        name, _, number = text.partition(":")
        try:
            fraction = float(number)
        except ValueError:
            fraction = 0.0
        if name != cls.name or not 0 < fraction <= 1:
            raise ValueError(
                f"'{text}' is not valid; expected topk:FRACTION, such as topk:0.01 to send 1 % "
                "of the values"
            )
        return cls(fraction)

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        flat = tensor.reshape(-1)
        count = math.ceil(self.fraction * flat.size)
        index = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
        value = clip_to(flat[index], _F32_MAX).astype(np.float32)
        return index.astype(np.int32), value

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        size = (math.prod(shape),)
        return (
            Part("#index", "int32", size, at_most=True),
            Part("#value", "float32", size, at_most=True),
        )

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        index, value = parts
        if index.size and not (
            index[0] >= 0 and index[-1] < like.size and (index[1:] > index[:-1]).all()
        ):
            raise ValueError(
                "the values of the part '#index' must increase and lie between 0 and "
                f"{like.size - 1}"
            )
        decoded = np.zeros(like.shape, like.dtype)
        decoded.reshape(-1)[index] = value
        return decoded


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
