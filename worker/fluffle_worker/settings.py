"""What a data owner decides of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fluffle_common.transport.reconnect import Backoff


@dataclass(frozen=True)
class WorkerSettings:
    """What the data owner decided.

    Args:
        federation: whose queues to use.
        worker: this worker's id, unique in the federation.
        task: what the task is called, for people.
        heartbeat_s: seconds between signs of life.
        occupied_s: seconds to wait, at the start, while another worker has this id: a connection
            that was cut lives on in the broker for up to two of its heartbeats.
        stay: wait for another run when one has ended.
        max_model_bytes: the largest model taken.
        state_dir: where a local rule's tensors are kept for a restart; None: in memory only.
        backoff: how to wait for a broker that is away.
    """

    federation: str
    worker: str
    task: str
    heartbeat_s: float = 2.0
    occupied_s: float = 45.0
    stay: bool = False
    max_model_bytes: int = 8 * 2**30
    state_dir: Path | None = None
    backoff: Backoff = field(default_factory=Backoff)
