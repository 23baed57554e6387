"""How often a worker may greet.

To each greeting the coordinator answers, and may send the work of the moment again, which is as
large as the model. A worker whose link breaks again and again greets often, and so does one that
means harm.
"""

from __future__ import annotations

from typing import NamedTuple

from fluffle_common.protocol.messages import Heartbeat, Hello

# So many at once; then one in so many seconds.
_AT_ONCE = 4
_EVERY_S = 5.0
_MOST_WORKERS = 100_000


class _Known(NamedTuple):
    session: str
    left: float  # greetings that it may have at once
    at: float


class Greetings:
    """Who greeted when."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def admit(self, sign: Hello | Heartbeat, now: float) -> Hello | Heartbeat | None:
        """Return a sign of life as it is to be taken.

        A hello too many of a session that is known is taken as a heartbeat. None where it is of
        another session, whose first sign of life would be a greeting too.
        """
        known = self._known.get(sign.worker)
        fresh = known is None or known.session != sign.session
        if not fresh and isinstance(sign, Heartbeat):
            return sign
        left = float(_AT_ONCE)
        if known is not None:
            left = min(left, known.left + (now - known.at) / _EVERY_S)
        if left >= 1:
            self._known.pop(sign.worker, None)
            if len(self._known) >= _MOST_WORKERS:
                del self._known[next(iter(self._known))]  # it has been silent for the longest
            self._known[sign.worker] = _Known(sign.session, left - 1, now)
            return sign
        if fresh:
            return None
        return Heartbeat.model_construct(**{**sign.__dict__, "kind": "heartbeat"})
