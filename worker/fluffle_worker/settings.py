"""The settings of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fluffle_common.transport.reconnect import Backoff


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that the data owner chooses."""

    federation: str
    worker: str  # its id, unique in the federation
    task: str  # its name, as shown to people
    heartbeat_s: float = 2.0  # between heartbeats
    # To wait at the start while another connection has this id; the broker keeps a broken
    # connection for up to three AMQP heartbeats.
    occupied_s: float = 75.0
    stay: bool = False  # whether to wait for the next run after one has ended
    state_dir: Path | None = None  # for state that outlives a restart; None keeps it in memory
    backoff: Backoff = field(default_factory=Backoff)
