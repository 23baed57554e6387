"""``f16``: each value as a float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fluffle_common.tensors.codecs.base import Part, Shape, clipped, plain
from fluffle_common.tensors.weights import Array, largest

_MAX = largest(np.dtype(np.float16))


@dataclass(frozen=True, slots=True)
class F16:
    """See ``Codec``."""

    name: ClassVar[str] = "f16"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    feeds_back: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str) -> F16:
        """See ``Codec``."""
        plain(text, cls.name)
        return cls()

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        """See ``Codec``."""
        return (clipped(tensor, _MAX).astype(np.float16),)

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        """See ``Codec``."""
        return (Part("", "float16", shape),)

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        """See ``Codec``."""
        (halves,) = parts
        return halves.astype(like.dtype)
