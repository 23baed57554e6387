"""``fluffle peek``: messages where they lie, decoded, and left there."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from fluffle_broker.cli.options import figures_if_told, looking, where
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.app import management_option
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo, echo_json, screen, table

if TYPE_CHECKING:
    from rich.table import Table

    from fluffle_broker.inspect.decode import DecodedMessage
    from fluffle_broker.inspect.peek import Peeked
    from fluffle_common.protocol.topology import Topology

MOST_ROWS = 12
_WIDE = 100  # columns


@click.command()
@click.argument("queue")
@click.option(
    "-n", "--count", default=5, show_default=True, type=counts(1, 10_000),
    help="Maximum number of messages, from the head of the queue; of the journal, from its end.",
)  # fmt: skip
@looking("Print a list of objects, with every tensor.")
@management_option
def peek(queue: str, count: int, **options: Any) -> None:
    """Decode messages of a QUEUE without taking them out of it.

    QUEUE is updates, presence, rejected, unrouted, journal or inbox.WORKER, with or without the
    federation in front.

    Each message is taken and given back to its place at once: depth, order and bodies stay as
    they are. What remains is the flag 'redelivered', and, of a queue that nobody reads, another
    30 minutes of life. While it is held, for milliseconds, it counts as unacked, and whoever
    reads the queue gets it so much later; so what a worker or a coordinator reads as it comes
    is refused, as are quorum queues, where giving back is not harmless. What the coordinator
    holds unacknowledged nobody else can see: 'fluffle journal' tells of it.

    \b
      fluffle peek updates --federation letters
      fluffle peek rejected -n 3 --federation letters --json
    """
    from fluffle_broker.inspect.peek import full_name
    from fluffle_common.cli.settings import management_of

    topology, address = where(options["federation"], options["url"])
    full_name(topology, queue)
    peeked = asyncio.run(_peek(address, topology, queue, count))
    now = time.time()
    if options["as_json"]:
        echo_json([reading.as_dict(now) for reading in peeked.readings])
    else:
        _show(peeked, now)
    held = _held(peeked, topology, address, management_of(address, options["management"]))
    if held:
        warn(held)


async def _peek(address: str, topology: Topology, queue: str, count: int) -> Peeked:
    from fluffle_broker.inspect import peek as peeking
    from fluffle_common.transport.once import open_once
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport

    async with open_once(AmqpTransport(address, "fluffle peek")) as link:
        return await peeking.peek(link, topology, queue, count)


def _held(peeked: Peeked, topology: Topology, address: str, base: str) -> str | None:
    """Say what could not be seen, because the coordinator has it."""
    if peeked.queue != topology.updates or not peeked.counts.consumers:
        return None
    journal = f"'fluffle journal --federation {topology.federation}' shows them"
    figures = figures_if_told(address, base, topology).get(peeked.queue)
    held = figures.unacknowledged if figures else None
    if held is None:
        return (
            "messages that the coordinator holds until its commit are invisible, and their "
            f"number is unknown without the management API; {journal}"
        )
    if not held:
        return None
    return (
        f"{held} more {('is' if held == 1 else 'are')} held by the coordinator until its "
        f"commit (RabbitMQ's statistics, up to 5 s old); {journal}"
    )


def _show(peeked: Peeked, now: float) -> None:
    from fluffle_common.transport.rabbitmq.queue_health import messages

    shown = f", {len(peeked.readings)} shown" if peeked.readings else ""
    kept = "kept" if any(r.delivery.offset is not None for r in peeked.readings) else "ready"
    echo(f"{peeked.queue}: {messages(peeked.counts.ready)} {kept}{shown}")
    for number, reading in enumerate(peeked.readings, 1):
        echo("")
        show_reading(reading, now, f"{number}  ")


def show_reading(reading: DecodedMessage, now: float, before: str = "") -> None:
    """Print one message in full, but for tensors beyond ``MOST_ROWS``."""
    from fluffle_broker.inspect.formatting import age, facts, size, words

    whom = f" of {reading.worker}" if reading.worker else ""
    headline = ", ".join([f"{reading.kind}{whom}", *facts(reading)])
    echo(f"{before}{headline}")
    properties = reading.delivery.properties
    told = [
        size(reading.size_bytes),
        f"{age(reading.age_s(now))} old",
        f"user {properties.user or 'unknown'}",
        f"message_id {properties.message_id or 'none'}",
        "redelivered" if reading.delivery.redelivered else "",
    ]
    echo("   " + ", ".join(filter(None, told)))
    said = reading.said()
    rest = {key: said[key] for key in ("run", "seconds", "session", "task", "plan") if key in said}
    if rest:
        echo("   " + ", ".join(f"{key} {words(value)}" for key, value in rest.items()))
    if reading.header("reason") is not None:
        cause = reading.header("cause") or "unknown"
        echo(f"   refused ({cause}): {reading.header('reason')}")
    if reading.message is None:
        echo(f"   begins with {reading.first_bytes.hex(' ')}")
    if reading.tensors:
        screen().print(_tensors(reading, wide=screen().width >= _WIDE))


def _tensors(reading: DecodedMessage, *, wide: bool) -> Table:
    """Draw a row a tensor; a narrow terminal has no room for the least, mean and largest value."""
    from fluffle_common.tensors.table import MODEL

    shown = reading.tensors[:MOST_ROWS]
    left = len(reading.tensors) - len(shown)
    more = f"   … and {left} more tensors; --json has them all" if left else None
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
