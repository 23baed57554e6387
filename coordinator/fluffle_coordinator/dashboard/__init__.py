"""The live page: what goes on in a federation, for a browser and for Prometheus.

::

    events, signs of life ──> RunView ──> board ──> feed ──> server (page, SSE, JSON, health)
                                 │          │          └───> metrics (Prometheus)
                                 │          └── snapshot ──> static/: what draws it
    a run's folder ──────────> RunView ─────────── snapshot ──> report: the same page, in one file

``coordinator_source`` feeds a board inside the coordinator; ``broker_source`` feeds one from the
broker, for a page that runs anywhere. Both only read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fluffle_common.errors import UsageError


@contextlib.contextmanager
def needs() -> Iterator[None]:
    """Say in words what to install, where what the page is served with is missing."""
    try:
        yield
    except ImportError:
        raise UsageError(
            "the page needs starlette, uvicorn and prometheus-client: "
            "pip install 'fluffle[dashboard]'"
        ) from None
