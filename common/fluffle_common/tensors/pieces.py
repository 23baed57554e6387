"""Named tensors that are never in one piece of memory: their bytes come piece by piece.

Example:
    >>> from fluffle_common.tensors.layout import layout_for
    >>> layout = layout_for({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)})
    >>> whole = np.arange(17, dtype=np.float32).tobytes()
    >>> delta = InPieces(layout, [memoryview(whole)[:64], memoryview(whole)[64:]])
    >>> [vector.size for vector in delta.vectors()], delta["b"]
    ([16, 1], array([16.], dtype=float32))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fluffle_common.tensors.layout import Array, Layout, Tensors


class InPieces(Mapping[str, Array]):
    """Tensors of one dtype, whose bytes come in pieces.

    A tensor that is asked for by its name has all of them put together, and read-only.

    Args:
        layout: in which places they are; all of one dtype.
        pieces: their bytes in order, each time they are iterated over; every piece is of whole
            elements, and good until the next one is asked for.
        norm: the norm of all tensors, which are finite; None where nobody has looked yet.
    """

    def __init__(
        self, layout: Layout, pieces: Iterable[memoryview], norm: float | None = None
    ) -> None:
        self.layout, self.pieces, self.norm = layout, pieces, norm
        self._joined: Tensors | None = None

    def vectors(self) -> Iterator[Array]:
        """Yield all values in order, with what is between the tensors, which means nothing."""
        for piece in self.pieces:
            yield np.frombuffer(piece, self.layout.dtype)

    def by_tensor(self) -> Iterator[tuple[str, Array]]:
        """Yield the same by the tensors they are of, without what is between those."""
        assert self.layout.dtype is not None
        size = self.layout.dtype.itemsize
        left = deque(
            (name, place.offset // size, place.offset // size + place.size)
            for name, place in self.layout.places.items()
        )
        begin = 0
        for vector in self.vectors():
            end = begin + vector.size
            while left and left[0][1] < end:
                name, first, last = left[0]
                yield name, vector[max(first - begin, 0) : last - begin]
                if last > end:  # the rest of it is in the next piece
                    break
                left.popleft()
            begin = end

    @property
    def joined(self) -> Tensors:
        """The same tensors in one piece of memory."""
        if self._joined is None:
            self._joined = self.layout.over(join(self.pieces, self.layout.nbytes))
        return self._joined

    def __getitem__(self, name: str) -> Array:
        return self.joined[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)


def join(pieces: Iterable[memoryview], nbytes: int) -> memoryview:
    """Return pieces in one piece of memory, read-only."""
    whole, end = np.empty(nbytes, np.uint8), 0
    for piece in pieces:
        whole[end : end + len(piece)] = np.frombuffer(piece, np.uint8)
        end += len(piece)
    return whole.data.toreadonly()
