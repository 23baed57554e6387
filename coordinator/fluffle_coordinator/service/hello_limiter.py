"""A token bucket per worker that limits how often the coordinator answers hellos.

Answering a hello can mean sending the current work again, which is as large as the model. A worker
with an unstable link, or a hostile one, may greet very often.
"""

from __future__ import annotations

from typing import NamedTuple

from fluffle_common.protocol.messages import Heartbeat, Hello

_BURST = 4.0
_REFILL_S = 5.0  # one more hello per so many seconds
_MAX_WORKERS = 100_000


class _Bucket(NamedTuple):
    session: str
    tokens: float
    updated_at: float
    left: bool = False  # whether the session has ended with a bye


class HelloLimiter:
    """Limits the hellos of each worker to 4 at once and then one in 5 seconds."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, sign: Hello | Heartbeat, now: float) -> bool:
        """Return whether the machine is to see a sign of life.

        The first heartbeat of a new session counts as a hello, because the coordinator answers it
        like one. A heartbeat of a session that has left is not admitted.
        """
        bucket = self._buckets.get(sign.worker)
        if bucket is not None and bucket.session == sign.session and isinstance(sign, Heartbeat):
            return not bucket.left
        tokens = _BURST
        if bucket is not None:
            tokens = min(_BURST, bucket.tokens + (now - bucket.updated_at) / _REFILL_S)
        if tokens < 1:
            return False
        self._buckets.pop(sign.worker, None)
        if len(self._buckets) >= _MAX_WORKERS:
            del self._buckets[next(iter(self._buckets))]  # the least recently updated
        self._buckets[sign.worker] = _Bucket(sign.session, tokens - 1, now)
        return True

    def left(self, worker: str, session: str) -> None:
        """Note that a session has ended with a bye."""
        bucket = self._buckets.get(worker)
        if bucket is not None and bucket.session == session:
            self._buckets[worker] = bucket._replace(left=True)
