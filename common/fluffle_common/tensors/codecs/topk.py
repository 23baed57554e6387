"""``topk:FRACTION``: the values with the largest magnitudes, and their flat indices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.codecs.base import Codec, Part, Shape, clip_to
from fluffle_common.tensors.weights import FLOATS, Array, largest

_MAX = largest(np.dtype(np.float32))


@dataclass(frozen=True, slots=True)
class TopK(Codec):
    """The codec ``topk``, with the ``fraction`` of the values that it keeps; see ``Codec``."""

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
        value = clip_to(flat[index], _MAX).astype(np.float32)
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
