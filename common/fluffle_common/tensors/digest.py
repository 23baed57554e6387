"""BLAKE3, the hash of checkpoints and transfers."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def blake3_of(pieces: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return the 32-byte BLAKE3 hash of the concatenated pieces."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()
