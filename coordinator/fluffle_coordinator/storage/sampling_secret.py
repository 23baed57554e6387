"""The secret seed of a run's Poisson samples, so that nobody can tell who is in them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fluffle_common.durable_files import replacing
from fluffle_common.errors import RunError

_BITS = 128


def sampling_secret(folder: Path) -> int:
    """Return the secret of the run in a folder; the first call creates it.

    A run keeps its secret, so that a round that a crash interrupts asks the same sample again.

    Raises:
        RunError: if the file cannot be read or written.
    """
    path = folder / "sampling.secret"
    try:
        if not path.exists():
            with replacing(path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(f"{secrets.randbits(_BITS):032x}\n".encode())
        return int(path.read_text(), 16)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}, which determines the selected workers, cannot be used ({error}); restore "
            "this file, or start a new run with --fresh"
        ) from None
