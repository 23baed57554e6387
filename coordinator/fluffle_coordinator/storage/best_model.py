"""The best model of a run so far, under a name of its own beside the checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fluffle_common.tensors.checkpoint import checkpoint_name

BEST_NAME = "best.safetensors"


def keep_best(folder: Path, number: int) -> None:
    """Let ``best.safetensors`` be the checkpoint of this round.

    Raises:
        OSError: where the disk refuses; the file is as it was.
    """
    beside = folder / f"{BEST_NAME}.partial"
    beside.unlink(missing_ok=True)
    checkpoint = folder / checkpoint_name(number)
    try:
        os.link(checkpoint, beside)  # a checkpoint is never written again
    except OSError:  # a file system without links
        shutil.copyfile(checkpoint, beside)
    os.replace(beside, folder / BEST_NAME)
