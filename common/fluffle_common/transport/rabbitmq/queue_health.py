"""Hints about queues that need attention, from their figures alone."""

from __future__ import annotations

from collections.abc import Sequence

from fluffle_common.plural import plural
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.management import QueueFigures

# Below this number of messages, growth is normal during a round.
_GROWN = 20
_STOPPED = ("down", "crashed", "stopped", "minority")


def hint(queue: QueueFigures, topology: Topology, alarms: Sequence[str] = ()) -> str | None:
    """Return what is wrong with a queue, and the remedy; None if nothing is wrong.

    Example:
        >>> topology = Topology("letters")
        >>> inbox = QueueFigures("letters.inbox.w3", "mail", 2, 0, consumers=0, size_bytes=9)
        >>> hint(inbox, topology)
        'worker w3 is not connected; 2 messages wait for it'
    """
    if not queue.known:
        return f"foreign: fluffle uses no queue of this name in federation {topology.federation}"
    if queue.state in _STOPPED:
        return f"RabbitMQ reports the state '{queue.state}'; check the broker's nodes and logs"
    hints = (
        _blocked(queue, topology, alarms),
        f"full ({queue.full}): it refuses messages" if queue.full else None,
        _misuse(queue, topology),
        _growing(queue),
    )
    return "; ".join(filter(None, hints)) or None


def _blocked(queue: QueueFigures, topology: Topology, alarms: Sequence[str]) -> str | None:
    if not alarms or queue.name not in (topology.updates, topology.presence):
        return None
    return f"blocked: the broker has run out of {' and '.join(alarms)}; nobody can publish"


def _misuse(queue: QueueFigures, topology: Topology) -> str | None:
    """Return what this queue lacks or should not contain."""
    inbox = topology.inbox("")
    if queue.name.startswith(inbox) and not queue.consumers:
        return f"worker {queue.name.removeprefix(inbox)} is not connected{_waiting(queue, 'it')}"
    if queue.name in (topology.updates, topology.presence) and not queue.consumers:
        return f"no coordinator is connected{_waiting(queue, 'one')}"
    at = f"--federation {topology.federation}"
    if queue.name == topology.rejected and queue.ready:
        return f"{plural(queue.ready, 'message')} rejected; see 'fluffle rejected {at}'"
    if queue.name == topology.unrouted and queue.ready:
        return (
            f"{plural(queue.ready, 'message')} matched no queue; see 'fluffle peek unrouted {at}'"
        )
    return None


def _waiting(queue: QueueFigures, whom: str) -> str:
    if not queue.ready:
        return ""
    return f"; {plural(queue.ready, 'message')} wait{'s' if queue.ready == 1 else ''} for {whom}"


def _growing(queue: QueueFigures) -> str | None:
    if queue.type == "stream" or queue.ready < _GROWN or (queue.growth_rate or 0) < 1:
        return None
    return f"growing by {queue.growth_rate:.0f} messages per second"
