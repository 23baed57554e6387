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

    def admit(self, sign: Hello | Heartbeat, now: float) -> Hello | Heartbeat | None:
        """Return a sign of life as the machine is to see it.

        The first heartbeat of a new session counts as a hello, because the coordinator answers it
        like one.

        Returns:
            ``sign`` if it is within the limit; a heartbeat instead of a surplus hello of the same
            session; None for a surplus hello of another session or of one that has left, and for a
            heartbeat of one that has left: else a bye and a heartbeat would be as good as a hello.
        """
        bucket = self._buckets.get(sign.worker)
        new_session = bucket is None or bucket.session != sign.session
        has_left = not new_session and bucket is not None and bucket.left
        if not new_session and isinstance(sign, Heartbeat):
            return None if has_left else sign
        tokens = _BURST
        if bucket is not None:
            tokens = min(_BURST, bucket.tokens + (now - bucket.updated_at) / _REFILL_S)
        if tokens < 1:
            surplus = {**sign.__dict__, "kind": "heartbeat"}
            return None if new_session or has_left else Heartbeat.model_construct(**surplus)
        self._buckets.pop(sign.worker, None)
        if len(self._buckets) >= _MAX_WORKERS:
            del self._buckets[next(iter(self._buckets))]  # the least recently updated
        self._buckets[sign.worker] = _Bucket(sign.session, tokens - 1, now)
        return sign

    def left(self, worker: str, session: str) -> None:
        """Note that a session has ended with a bye."""
        bucket = self._buckets.get(worker)
        if bucket is not None and bucket.session == session:
            self._buckets[worker] = bucket._replace(left=True)
