"""``fluffle --debug``: the output of the loggers in ``debug_loggers``, on stderr."""

from __future__ import annotations

import logging

from fluffle_common.cli.printing import echo
from fluffle_common.debug_loggers import ROOT


class _Stderr(logging.Handler):
    """Writes records through ``echo``, which escapes text and survives a closed stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(self.format(record), err=True)


def show_debug_log() -> None:
    """Enable all fluffle loggers, with the time and the logger's name."""
    log = logging.getLogger(ROOT)
    log.setLevel(logging.DEBUG)
    handler = _Stderr()
    line = "{asctime}.{msecs:03.0f}  {name}  {message}"
    handler.setFormatter(logging.Formatter(line, "%H:%M:%S", style="{"))
    log.handlers = [handler]
