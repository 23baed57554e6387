"""Tensors that wait on disk: written to a file without a name, and mapped into memory.

Such a file is gone as soon as nobody uses its tensors any more, whatever happens to the process.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

from fluffle_common.tensors.layout import Tensors, bytes_of, layout_for
from fluffle_common.tensors.weights import Weights


def laid_on_disk(tensors: Weights, folder: Path) -> Tensors:
    """Return the same tensors, read-only, in a file instead of in memory.

    Args:
        tensors: of dtypes that travel.
        folder: where the file is; never /tmp, which is memory on many machines.

    Raises:
        OSError: where the disk refuses.
    """
    layout = layout_for(tensors)
    if not layout.nbytes:
        return layout.over(b"")
    with tempfile.TemporaryFile(dir=folder) as file:
        for entry in layout.table:
            file.seek(entry.offset)
            file.write(bytes_of(tensors[entry.name]))
        file.truncate(layout.nbytes)  # a last tensor may be empty
        return layout.over(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def let_go(tensors: Weights) -> None:
    """Give back the memory of tensors that are on disk; they are read again when they are used."""
    memory = tensors.memory if isinstance(tensors, Tensors) else None
    if memory is not None and isinstance(memory.obj, mmap.mmap):
        memory.obj.madvise(mmap.MADV_DONTNEED)
