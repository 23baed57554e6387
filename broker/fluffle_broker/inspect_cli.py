"""``fluffle queues``: what is in a federation's queues, in plain words."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from fluffle_broker.looking import looking, screen, where
from fluffle_common.cli import management_option

if TYPE_CHECKING:
    from rich.table import Table

    from fluffle_broker.inspect import Look

_EVERY_S = 2.0


@click.command()
@looking("Print a list of objects; with --watch one such list a line.")
@management_option
@click.option("--watch", is_flag=True, help="Look again every 2 seconds; Ctrl-C ends it.")
def queues(
    federation: str, url: str | None, management: str | None, as_json: bool, watch: bool
) -> None:
    """Show a federation's queues, what each is for and what is off with it; changes nothing.

    \b
    ready      waiting to be delivered
    unacked    delivered, and not yet done with; an update stays so until its
               round is on the coordinator's disk
    in/s out/s messages that came in, and were handed out, per second
    oldest     age of the message at the head, by its sender's clock

    The figures are RabbitMQ's statistics, which are up to 5 seconds old. Where the management
    API cannot be reached, AMQP still tells what is ready in the shared queues.

    \b
      fluffle queues --federation letters --watch
      fluffle queues --federation letters --json | jq '.[] | select(.hint)'
    """
    from fluffle_broker.inspect import look
    from fluffle_common.settings import management_of

    topology, address = where(federation, url)
    base = management_of(address, management)

    def once() -> Look:
        return look(address, base, topology)

    if watch:
        _watch(once, as_json)
        return
    found = once()
    if as_json:
        click.echo(json.dumps(found.as_dicts(), indent=2))
    elif found.queues:
        screen().print(_table(found))
    else:
        click.echo(f"federation {federation} has no queues on this broker yet")
    _notes(found)


def _notes(found: Look) -> None:
    if found.alarms:
        click.echo(
            f"fluffle: the broker has run out of {' and '.join(found.alarms)}: "
            "it takes no messages from anybody until there is room again",
            err=True,
        )
    if found.note:
        click.echo(f"fluffle: {found.note}", err=True)


def _watch(once: Callable[[], Look], as_json: bool) -> None:
    """Look again and again: redrawn on a terminal, a block a look elsewhere."""
    from rich.live import Live

    from fluffle_common.errors import BrokerError

    live = None
    if sys.stdout.isatty() and not as_json:
        live = Live(console=screen(), auto_refresh=False, screen=False)
        live.start()
    try:
        while True:
            try:
                found = once()
            except BrokerError as why:  # it may be starting again
                click.echo(f"fluffle: {why}", err=True)
            else:
                if as_json:
                    click.echo(json.dumps(found.as_dicts()))
                elif live is not None:
                    # What does not fit on the screen is cut off at its end.
                    found.queues.sort(key=lambda queue: found.hint(queue) is None)
                    live.update(_table(found), refresh=True)
                else:
                    click.echo(time.strftime("%H:%M:%S"))
                    screen().print(_table(found))
                    _notes(found)
            sys.stdout.flush()
            time.sleep(_EVERY_S)
    finally:
        if live is not None:
            live.stop()


def _table(found: Look) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fluffle_broker.words import age, rate, size

    caption = "; ".join(filter(None, [found.note, *(f"out of {what}" for what in found.alarms)]))
    table = Table(box=box.SIMPLE_HEAD, caption=caption or None, caption_justify="left")
    table.add_column("queue", no_wrap=True)
    for name in ("ready", "unacked", "consumers", "bytes", "in/s", "out/s", "oldest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is for, and what is off")
    for queue in found.queues:
        words = Text(queue.purpose, style="dim")
        hint = found.hint(queue)
        if hint:
            words.append(f"\n! {hint}", style="not dim bold yellow")
        table.add_row(
            queue.name,
            f"{queue.ready:,}",
            "?" if queue.unacknowledged is None else f"{queue.unacknowledged:,}",
            str(queue.consumers),
            "?" if queue.size_bytes is None else size(queue.size_bytes),
            rate(queue.in_rate),
            rate(queue.out_rate),
            age(queue.oldest_s) if queue.ready else "",
            words,
        )
    return table
