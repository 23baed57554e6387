"""Loggers for whoever looks for a bug; unless somebody listens, nothing is even put into words.

All are under ``fluffle``, and say everything at the level DEBUG:

- ``fluffle.coordinator.machine`` and ``fluffle.worker.machine``: each event, and what follows;
- ``fluffle.transport.link``: links that are opened or lost, and what is declared over them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

ROOT = "fluffle"
_MOST_CHARACTERS = 400  # of one event, or one effect: a cohort may have thousands of names


def logger(name: str) -> logging.Logger:
    """Return the logger of this name under ``fluffle``."""
    return logging.getLogger(f"{ROOT}.{name}")


def log_step(to: logging.Logger, event: object, effects: Iterable[object]) -> None:
    """Log an event of a machine and the effects that it had, in one line."""
    if to.isEnabledFor(logging.DEBUG):
        to.debug("%s -> %s", _shown(event), ", ".join(map(_shown, effects)) or "nothing")


def _shown(one: object) -> str:
    text = repr(one)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
