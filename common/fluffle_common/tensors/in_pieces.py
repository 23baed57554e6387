"""Named tensors whose bytes are read in pieces, so that a large update is never whole in memory.

Example:
    >>> from fluffle_common.tensors.layout import layout_for
    >>> layout = layout_for({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)})
    >>> memory = memoryview(np.arange(17, dtype=np.float32).tobytes())
    >>> delta = InPieces(layout, [memory[:64], memory[64:]])
    >>> [vector.size for vector in delta.vectors()], delta["b"]
    ([16, 1], array([16.], dtype=float32))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fluffle_common.tensors.layout import Array, Layout, Tensors


class InPieces(Mapping[str, Array]):
    """Tensors of a single dtype whose bytes come in pieces.

    Access by name joins the pieces in memory; ``vectors`` and ``by_tensor`` do not.

    Args:
        layout: the layout of the tensors, all of one dtype.
        pieces: the bytes of the whole layout in order; iterable more than once. Every piece
            consists of whole elements, and is valid until the next piece is requested.
        norm: the norm of the tensors, if it is known and all values are finite.
    """

    def __init__(
        self, layout: Layout, pieces: Iterable[memoryview], norm: float | None = None
    ) -> None:
        self.layout, self.pieces, self.norm = layout, pieces, norm
        self._joined: Tensors | None = None

    def vectors(self) -> Iterator[Array]:
        """Yield each piece as a vector, including the gaps between tensors (undefined values)."""
        for piece in self.pieces:
            yield np.frombuffer(piece, self.layout.dtype)

    def by_tensor(self) -> Iterator[tuple[str, Array]]:
        """Yield the values in order, without gaps, as vectors that each belong to one tensor."""
        assert self.layout.dtype is not None
        size = self.layout.dtype.itemsize
        remaining = deque(
            (name, place.offset // size, place.offset // size + place.size)
            for name, place in self.layout.places.items()
        )
        begin = 0
        for vector in self.vectors():
            end = begin + vector.size
            while remaining and remaining[0][1] < end:
                name, first, last = remaining[0]
                yield name, vector[max(first - begin, 0) : last - begin]
                if last > end:  # continues in the next piece
                    break
                remaining.popleft()
            begin = end

    def __getitem__(self, name: str) -> Array:
        if self._joined is None:
            buffer, end = np.empty(self.layout.nbytes, np.uint8), 0
            for piece in self.pieces:
                buffer[end : end + len(piece)] = np.frombuffer(piece, np.uint8)
                end += len(piece)
            self._joined = self.layout.over(buffer.data.toreadonly())
        return self._joined[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)
