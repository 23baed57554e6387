"""``fluffle peek``: decode messages and leave them in their queue."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from fluffle_broker.cli.options import available_figures, federation_and_broker, inspection_options
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.app import management_option
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo, echo_json, screen, table
from fluffle_common.plural import plural

if TYPE_CHECKING:
    from rich.table import Table

    from fluffle_broker.inspect.decode import DecodedMessage
    from fluffle_broker.inspect.peek import Peeked
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.management import Management

MOST_ROWS = 12
_WIDE = 100  # columns


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

    The command refuses a queue other than 'updates' while a process reads it, because the reader
    could get the messages in another order. It also refuses quorum queues, because they cannot take
    a message back without side effects. It cannot show updates that the coordinator holds
    unacknowledged; 'fluffle journal' shows their events.

    \b
      fluffle peek updates --federation letters
      fluffle peek rejected -n 3 --federation letters --json
    """
    from fluffle_broker.inspect.peek import full_name
    from fluffle_common.cli.settings import management_of

    topology, address = federation_and_broker(options["federation"], options["url"])
    peeked = asyncio.run(_peek(address, topology, full_name(topology, queue), count))
    now = time.time()
    if options["as_json"]:
        echo_json([decoded.as_dict(now) for decoded in peeked.messages])
    else:
        _show(peeked, now)
    held = _held(peeked, topology, management_of(address, options["management"]))
    if held:
        warn(held)


async def _peek(address: str, topology: Topology, queue: str, count: int) -> Peeked:
    from fluffle_broker.inspect import peek as peeking
    from fluffle_common.transport.open_once import open_once
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport

    async with open_once(AmqpTransport(address, "fluffle peek")) as link:
        return await peeking.peek(link, topology, queue, count)


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
    shown = f", {len(peeked.messages)} shown" if peeked.messages else ""
    kept = "kept" if any(r.delivery.offset is not None for r in peeked.messages) else "ready"
    echo(f"{peeked.queue}: {plural(peeked.counts.ready, 'message')} {kept}{shown}")
    for number, decoded in enumerate(peeked.messages, 1):
        echo("")
        show_message(decoded, now, f"{number}  ")


def show_message(decoded: DecodedMessage, now: float, before: str = "") -> None:
    """Print one message in full, with at most ``MOST_ROWS`` tensors."""
    from fluffle_broker.inspect.formatting import age, facts, size, words

    sender = f" of {decoded.worker}" if decoded.worker else ""
    headline = ", ".join([f"{decoded.kind}{sender}", *facts(decoded)])
    echo(f"{before}{headline}")
    properties = decoded.delivery.properties
    delivery_facts = [
        size(decoded.size_bytes),
        f"{age(decoded.age_s(now))} old",
        f"user {properties.user or 'unknown'}",
        f"message_id {properties.message_id or 'none'}",
        "redelivered" if decoded.delivery.redelivered else "",
    ]
    echo("   " + ", ".join(filter(None, delivery_facts)))
    fields = decoded.fields()
    names = ("run", "seconds", "session", "task", "plan")
    rest = {name: fields[name] for name in names if name in fields}
    if rest:
        echo("   " + ", ".join(f"{key} {words(value)}" for key, value in rest.items()))
    if decoded.header("reason") is not None:
        cause = decoded.header("cause") or "unknown"
        echo(f"   rejected ({cause}): {decoded.header('reason')}")
    if decoded.message is None:
        echo(f"   begins with {decoded.first_bytes.hex(' ')}")
    if decoded.tensors:
        screen().print(_tensors(decoded, wide=screen().width >= _WIDE))


def _tensors(decoded: DecodedMessage, *, wide: bool) -> Table:
    """Return a table of tensors; only a wide terminal has room for min, mean and max."""
    from fluffle_common.tensors.table import MODEL

    shown = decoded.tensors[:MOST_ROWS]
    left = len(decoded.tensors) - len(shown)
    more = f"   … and {left} more tensors; --json shows all tensors" if left else None
    rows = table(caption=more, pad_edge=False, padding=(0, 1))
    rows.add_column("   tensor", overflow="fold", min_width=12)
    values = ("norm", "min", "mean", "max") if wide else ("norm",)
    for name in ("dtype", "shape", *values, "NaN", "inf"):
        rows.add_column(name, justify="right", no_wrap=True)
    for tensor in shown:
        numbers = [getattr(tensor, name) for name in values]
        rows.add_row(
            f"   {tensor.name}" + f" ({tensor.group})" * (tensor.group != MODEL),
            tensor.dtype,
            "x".join(map(str, tensor.shape)) or "scalar",
            *("-" if number is None else f"{number:.4g}" for number in numbers),
            *("-" if count is None else str(count) for count in (tensor.nan, tensor.inf)),
        )
    return rows
