"""``fluffle --debug``: what the loggers of ``logs`` say, on stderr."""

from __future__ import annotations

import logging

from fluffle_common.cli.printing import echo
from fluffle_common.logs import ROOT


class _Stderr(logging.Handler):
    """Prints as everything is printed: escaped, and without failing where stderr is gone."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(self.format(record), err=True)


def show_debug_log() -> None:
    """Let every logger of ours speak, with the time and its name."""
    log = logging.getLogger(ROOT)
    log.setLevel(logging.DEBUG)
    if not any(isinstance(one, _Stderr) for one in log.handlers):
        handler = _Stderr()
        form = "{asctime}.{msecs:03.0f}  {name}  {message}"
        handler.setFormatter(logging.Formatter(form, "%H:%M:%S", style="{"))
        log.addHandler(handler)
