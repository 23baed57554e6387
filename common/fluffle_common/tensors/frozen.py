"""Frozen tensors: the part of a model that never changes, such as a backbone under adapters.

They have a name made from their content, the digest. So both sides can tell without sending them
whether they hold the same ones, and a file of them is checked by its name.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from fluffle_common.errors import UsageError
from fluffle_common.tensors.checkpoint import map_tensors, save_checkpoint
from fluffle_common.tensors.digest import blake3_of
from fluffle_common.tensors.layout import Weights, bytes_of

IN_METADATA = "frozen"
"""The key in a checkpoint's metadata under which stands the digest of its frozen tensors."""


class Frozen(NamedTuple):
    """Frozen tensors and their digest; without tensors, the digest is empty."""

    digest: str
    tensors: Weights


NO_FROZEN = Frozen("", {})


def frozen_of(tensors: Weights) -> Frozen:
    """Return frozen tensors with their digest.

    The digest is the BLAKE3, in hexadecimal, of the JSON array of all ``[name, dtype, shape]``,
    sorted by name, followed by the bytes of the tensors in this order. The order in which they are
    given has no effect on it.

    Example:
        >>> import numpy as np
        >>> frozen_of({"w": np.zeros(2, np.float32)}).digest[:16]
        'c0cfac1ff56f74d4'
    """
    if not tensors:
        return NO_FROZEN
    names = sorted(tensors)
    table = [(name, tensors[name].dtype.name, tensors[name].shape) for name in names]
    packed = json.dumps(table, separators=(",", ":")).encode()
    pieces = (bytes_of(tensors[name]) for name in names)
    return Frozen(blake3_of([packed, *pieces]).hex(), tensors)


def frozen_file(folder: Path, digest: str) -> Path:
    """Return where in a folder the frozen tensors of this digest are kept."""
    return folder / f"frozen-{digest[:16]}.safetensors"


def save_frozen(folder: Path, frozen: Frozen) -> None:
    """Write frozen tensors into a folder, whole or not at all, unless their file is intact."""
    path = frozen_file(folder, frozen.digest)
    with contextlib.suppress(UsageError):  # missing or damaged
        read_frozen(folder, frozen.digest)
        return
    save_checkpoint(path, frozen.tensors, {IN_METADATA: frozen.digest})


def read_frozen(folder: Path, digest: str) -> Frozen:
    """Return the frozen tensors of this digest as memory maps of their file.

    An empty digest stands for none.

    Raises:
        UsageError: if the file is missing or damaged, or holds other tensors.
    """
    if not digest:
        return NO_FROZEN
    path = frozen_file(folder, digest)
    try:
        found = frozen_of(map_tensors(path))
        if found.digest != digest:
            raise UsageError(
                f"{path} contains different tensors, with the digest {found.digest[:16]}…"
            )
    except UsageError as why:
        raise UsageError(
            f"the model's frozen tensors cannot be read ({why}); restore this file, or copy it "
            "from the run folder that the model comes from"
        ) from None
    return found
