"""Tensors in memory-mapped temporary files, for updates that would not fit into memory.

The files have no name, so the system deletes each as soon as its tensors are no longer in use, even
if the process crashes.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

from fluffle_common.tensors.layout import Tensors, bytes_of, layout_for
from fluffle_common.tensors.weights import Weights


def map_to_disk(tensors: Weights, folder: Path) -> Tensors:
    """Write tensors to a file and return them as a read-only memory map of it.

    ``folder`` should not be ``/tmp``, which many systems keep in memory.
    """
    layout = layout_for(tensors)
    if not layout.nbytes:
        return layout.over(b"")
    with tempfile.TemporaryFile(dir=folder) as file:
        for entry in layout.table:
            file.seek(entry.offset)
            file.write(bytes_of(tensors[entry.name]))
        file.truncate(layout.nbytes)  # extends the file if the last tensor is empty
        return layout.over(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def release_pages(tensors: Weights) -> None:
    """Free the memory of tensors that ``map_to_disk`` returned; the next access reads the file."""
    memory = tensors.memory if isinstance(tensors, Tensors) else None
    if memory is not None and isinstance(memory.obj, mmap.mmap):
        memory.obj.madvise(mmap.MADV_DONTNEED)
