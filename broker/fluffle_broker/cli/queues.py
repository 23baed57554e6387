"""``fluffle queues``: what is in a federation's queues, in plain words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from fluffle_broker.cli.options import looking, where
from fluffle_common.cli.app import management_option
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo, echo_json, is_terminal, screen

if TYPE_CHECKING:
    from fluffle_broker.inspect.queues import Look

_EVERY_S = 2.0


@click.command()
@looking("Print a list of objects; with --watch one such list a line.")
@management_option
@click.option("--watch", is_flag=True, help="Repeat every 2 seconds, until Ctrl-C.")
def queues(
    federation: str, url: str | None, management: str | None, as_json: bool, watch: bool
) -> None:
    """Show a federation's queues, and what is off with them.

    It changes nothing.

    \b
    ready      waiting to be delivered
    unacked    delivered, and not yet done with; an update stays so until its
               round is on the coordinator's disk
    in/s out/s messages that came in, and were handed out, per second
    oldest     age of the message at the head, by its sender's clock

    Below the table, each line with "!" says what is off and what to do about it. Several empty
    queues of one kind share a row, and a wide terminal also shows what each queue is for; --json
    has every queue with everything.

    The figures are RabbitMQ's statistics, which are up to 5 seconds old. When the management
    API cannot be reached, AMQP still tells what is ready in the shared queues.

    \b
      fluffle queues --federation letters --watch
      fluffle queues --federation letters --json | jq '.[] | select(.hint)'
    """
    from fluffle_broker.inspect.queues import look
    from fluffle_common.cli.settings import management_of

    topology, address = where(federation, url)
    base = management_of(address, management)

    def once() -> Look:
        return look(address, base, topology)

    if watch:
        _watch(once, as_json)
        return
    found = once()
    if as_json:
        echo_json(found.as_dicts())
    elif found.queues:
        _show(found)
    else:
        echo(
            f"federation {federation} has no queues on this broker yet; its coordinator and "
            "workers create them when they start"
        )
    _notes(found)


def _show(found: Look) -> None:
    from fluffle_broker.inspect.queues_table import drawn, hints

    shown = screen()
    shown.print(drawn(found, shown.width))
    if any(None in (one.in_rate, one.size_bytes) for one in found.queues):
        shown.print("?  unknown: RabbitMQ has not reported it, or not yet", style="dim")
    for line in hints(found):
        # In a pipe, a hint is one line, so that it can be searched for.
        shown.print(f"! {line}", style="bold yellow", soft_wrap=not shown.is_terminal)
    if found.at_rest:
        at = f"--federation {found.topology.federation}"
        shown.print(f"nobody is connected; 'fluffle explain {at}' says how the last run went")


def _notes(found: Look) -> None:
    if found.alarms:
        warn(
            f"the broker has run out of {' and '.join(found.alarms)}: it accepts no messages "
            "until there is room again"
        )
    if found.note:
        warn(found.note)


def _watch(once: Callable[[], Look], as_json: bool) -> None:
    """Look again and again: redrawn on a terminal, a block a look elsewhere."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from fluffle_broker.inspect.queues_table import drawn, hints
    from fluffle_common.errors import BrokerError

    live = None
    if is_terminal(sys.stdout) and not as_json:
        live = Live(console=screen(), auto_refresh=False, screen=False)
        live.start()
    try:
        while True:
            try:
                found = once()
            except BrokerError as why:  # it may be starting again
                warn(str(why))
            else:
                if as_json:
                    echo_json(found.as_dicts(), indent=None)
                elif live is not None:
                    # What does not fit on the screen is cut off at its end: hints come first.
                    lines = [*hints(found), *([found.note] if found.note else [])]
                    told = [Text(f"! {line}", style="bold yellow") for line in lines]
                    live.update(Group(*told, drawn(found, live.console.width)), refresh=True)
                else:
                    echo(time.strftime("%H:%M:%S"))
                    _show(found)
                    _notes(found)
            time.sleep(_EVERY_S)
    finally:
        if live is not None:
            live.stop()
