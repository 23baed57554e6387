"""The settings of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fluffle_common.transport.reconnect import Backoff


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that the data owner chooses.

    Args:
        federation: the name of the federation.
        worker: this worker's id, unique in the federation.
        task: the name of the task, as shown to people.
        heartbeat_s: seconds between heartbeats.
        occupied_s: seconds to wait at the start while another connection has this id; the broker
            keeps a broken connection for up to two AMQP heartbeats.
        stay: whether to wait for the next run after one has ended.
        max_model_bytes: the largest model accepted.
        state_dir: the folder for state that outlives a restart; if None, it is in memory only.
        backoff: how to retry an unreachable broker.
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
