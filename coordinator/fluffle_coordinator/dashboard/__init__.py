"""The live page of a federation, for browsers and for Prometheus.

::

    events, heartbeats ──> RunView ──> board ──> feed ──> server (page, SSE, JSON, health)
                              │          │         └────> metrics (Prometheus)
                              │          └── snapshot ──> static/: draws it in the browser
    a run folder ────────> RunView ───────── snapshot ──> report: the same page as one file

``coordinator_source`` feeds a board inside the coordinator; ``broker_source`` feeds one from the
broker, so that the page can run anywhere. Both are read-only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fluffle_common.errors import UsageError


@contextlib.contextmanager
def needs() -> Iterator[None]:
    """Turn the ``ImportError`` of a missing optional dependency into one that says what to install.

    Raises:
        UsageError: a package that serves the page is not installed.
    """
    try:
        yield
    except ImportError:
        raise UsageError(
            "the page needs starlette, uvicorn and prometheus-client; "
            "run pip install 'fluffle[dashboard]'"
        ) from None
