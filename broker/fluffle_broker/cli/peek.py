"""``fluffle peek``: decode messages and leave them in their queue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from fluffle_broker.cli.options import (
    available_figures,
    federation_and_broker,
    inspection_options,
    with_link,
)
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.app import management_option
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo, echo_json
from fluffle_common.plural import plural

if TYPE_CHECKING:
    from fluffle_broker.inspect.peek import Peeked
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.management import Management


@click.command()
@click.argument("queue")
@click.option(
    "-n", "--count", default=5, show_default=True, type=counts(1, 10_000),
    help="Maximum number of messages to show. From a queue, the command shows the oldest messages; "
    "from the journal, the newest messages.",
)  # fmt: skip
@inspection_options("Print the messages as a list of JSON objects, with every tensor.")
@management_option
def peek(queue: str, count: int, **options: Any) -> None:
    """Decode messages of a QUEUE without removing them.

    QUEUE is updates, presence, rejected, unrouted, journal or inbox.WORKER, with or without the
    federation's name as a prefix.

    The command takes each message and returns it to its position at once. The queue's length, the
    order and the message bodies stay the same. The command leaves two traces in a queue: the
    messages are marked 'redelivered', and the time after which an unused queue expires (30 minutes)
    starts again.

    Except for 'updates', the command refuses a queue while a process reads it, because this process
    could get the messages in another order. The command also refuses quorum queues, because they
    cannot take a message back without side effects. The command cannot show updates that the
    coordinator holds unacknowledged; 'fluffle journal' shows their events.

    \b
      fluffle peek updates --federation letters
      fluffle peek rejected -n 3 --federation letters --json
    """
    from fluffle_broker.inspect import peek as peeking

    topology, api = federation_and_broker(
        options["federation"], options["url"], options["management"]
    )
    peeked = with_link(api.url, lambda link: peeking.peek(link, topology, queue, count))
    now = time.time()
    if options["as_json"]:
        echo_json([decoded.as_dict(now) for decoded in peeked.messages])
    else:
        _show(peeked, now)
    if held := _held(peeked, topology, api):
        warn(held)


def _held(peeked: Peeked, topology: Topology, api: Management) -> str | None:
    """Return a note about the updates that the coordinator holds, which peek cannot see."""
    if peeked.queue != topology.updates or not peeked.counts.consumers:
        return None
    journal = f"see their events with 'fluffle journal --federation {topology.federation}'"
    figures = available_figures(api, topology).get(peeked.queue)
    held = figures.unacknowledged if figures else None
    if held is None:
        return (
            "the messages that the coordinator holds until its commit are not shown, and their "
            f"number is unknown without the management API; {journal}"
        )
    if not held:
        return None
    return (
        f"the coordinator holds {plural(held, 'more message')} until its commit (according "
        f"to RabbitMQ's statistics, up to 5 s old); {journal}"
    )


def _show(peeked: Peeked, now: float) -> None:
    from fluffle_broker.inspect.formatting import show_message

    shown = f", {len(peeked.messages)} shown" if peeked.messages else ""
    kept = "kept" if any(r.delivery.offset is not None for r in peeked.messages) else "ready"
    echo(f"{peeked.queue}: {plural(peeked.counts.ready, 'message')} {kept}{shown}")
    for number, decoded in enumerate(peeked.messages, 1):
        echo("")
        show_message(decoded, now, f"{number}  ")
