"""The hash that checkpoints and transfers carry: BLAKE3."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def blake3_of(pieces: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return the BLAKE3 of some bytes, which may come in pieces: 32 bytes."""
    found = blake3()
    for piece in pieces:
        found.update(piece)
    return found.digest()
