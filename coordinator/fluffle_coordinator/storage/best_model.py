"""The run's best model so far, as ``best.safetensors`` in the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fluffle_common.tensors.checkpoint import checkpoint_name

BEST_NAME = "best.safetensors"


def keep_best(folder: Path, number: int) -> None:
    """Make ``best.safetensors`` the checkpoint of this round.

    Raises:
        OSError: if it cannot be written; the earlier file is then unchanged.
    """
    checkpoint, best = folder / checkpoint_name(number), folder / BEST_NAME
    if best.exists() and best.samefile(checkpoint):
        return  # to rename a hard link to another of the same file does nothing
    partial = folder / f"{BEST_NAME}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(checkpoint, partial)  # safe, since a checkpoint is never written to again
    except OSError:  # the file system has no hard links
        shutil.copyfile(checkpoint, partial)
    os.replace(partial, best)
