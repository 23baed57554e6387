"""Debug loggers under ``fluffle``; they format nothing unless the level DEBUG is enabled.

- ``fluffle.coordinator.machine`` and ``fluffle.worker.machine``: each event and its effects
- ``fluffle.transport.link``: links opened and lost, and the entities declared over them
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

ROOT = "fluffle"
_MAX_CHARACTERS = 400  # of one event or effect: a cohort may have thousands of names


def logger(name: str) -> logging.Logger:
    """Return the logger ``fluffle.<name>``."""
    return logging.getLogger(f"{ROOT}.{name}")


def log_step(to: logging.Logger, event: object, effects: Iterable[object]) -> None:
    """Log a state machine's event and its effects in one line."""
    if to.isEnabledFor(logging.DEBUG):
        to.debug("%s -> %s", _shortened(event), ", ".join(map(_shortened, effects)) or "nothing")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
