"""The live page of a federation, for browsers and for Prometheus.

::

    events, heartbeats ──> RunView ──> board ──> feed ──> server (page, SSE, JSON, health)
                              │          │         └────> metrics (Prometheus)
                              │          └── snapshot ──> static/: draws it in the browser
    a run folder ────────> RunView ───────── snapshot ──> report: the same page as one file

``coordinator_source`` feeds a board inside the coordinator; ``broker_source`` feeds one from the
broker, so that the page can run anywhere. Both are read-only.
"""
