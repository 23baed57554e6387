"""``fluffle queues``: what is in a federation's queues, in plain words."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from fluffle_common.cli import federation_option, url_option

if TYPE_CHECKING:
    from fluffle_broker.inspect import QueueFigures


@click.command()
@federation_option
@url_option
@click.option(
    "--management",
    envvar="FLUFFLE_MANAGEMENT_URL",
    metavar="URL",
    help="RabbitMQ's management API.  [default: that of the broker of --url, on its usual port]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def queues(federation: str, url: str | None, management: str | None, as_json: bool) -> None:
    """Show a federation's queues and what each is for; changes nothing.

    ready: waiting to be delivered. unacked: delivered, and not yet done with; an update stays so
    until its round is on the coordinator's disk.
    """
    from fluffle_broker.inspect import look, management_base
    from fluffle_common.amqp import parse_url
    from fluffle_common.settings import broker_url, check_federation, node_record, state_folder
    from fluffle_common.topology import Topology

    topology = Topology(check_federation(federation))
    address = broker_url(url)
    parse_url(address)
    base = management_base(address, management, node_record(state_folder()))
    found, note = look(address, base, topology)
    if as_json:
        click.echo(json.dumps([queue.as_dict() for queue in found], indent=2))
    elif found:
        _table(found)
    else:
        click.echo(f"federation {federation} has no queues on this broker yet")
    if note:
        click.echo(f"fluffle: {note}", err=True)


def _table(found: list[QueueFigures]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("queue", no_wrap=True)
    for name in ("ready", "unacked", "consumers", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is for")
    for queue in found:
        table.add_row(
            queue.name,
            str(queue.ready),
            "?" if queue.unacknowledged is None else str(queue.unacknowledged),
            str(queue.consumers),
            "?" if queue.size_bytes is None else _size(queue.size_bytes),
            queue.purpose,
        )
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(table)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
