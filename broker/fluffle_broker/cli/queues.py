"""``fluffle queues``: the state of a federation's queues."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from fluffle_broker.cli.options import federation_and_broker, inspection_options
from fluffle_common.cli.app import management_option
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import can_redraw, echo, echo_json, printable, screen

if TYPE_CHECKING:
    from fluffle_broker.inspect.queues import QueueOverview

_EVERY_S = 2.0


@click.command()
@inspection_options("Print a list of JSON objects; with --watch, print one list per line.")
@management_option
@click.option(
    "--watch", is_flag=True, help="Refresh the table every 2 seconds until you press Ctrl-C."
)
def queues(
    federation: str, url: str | None, management: str | None, as_json: bool, watch: bool
) -> None:
    """Show a federation's queues and any problems.

    The command changes nothing.

    \b
    ready      messages that wait for delivery
    unacked    messages that are delivered but not acknowledged; an update is
               acknowledged once its round is on the coordinator's disk
    in/s out/s messages published and delivered per second
    oldest     age of the oldest ready message, by its sender's clock

    Below the table, each line with "!" names a problem. Several empty queues of one kind share a
    row. A wide terminal also shows the purpose of each queue; --json prints every queue with all
    figures.

    The figures are RabbitMQ's statistics, which are up to 5 seconds old. If the management API is
    unreachable, the command shows only the ready messages and the consumers of the shared queues.

    \b
      fluffle queues --federation letters --watch
      fluffle queues --federation letters --json | jq '.[] | select(.hint)'
    """
    from fluffle_broker.inspect.queues import read_overview
    from fluffle_common.cli.settings import broker_url_finder, management_finder

    topology, _ = federation_and_broker(federation, url, management)
    find_url, find_management = broker_url_finder(url), management_finder(management)

    def once() -> QueueOverview:
        return read_overview(find_management(find_url()), topology)

    if watch:
        _watch(once, as_json)
        return
    overview = once()
    if as_json:
        echo_json(overview.as_dicts())
    else:
        _show(overview)
    _warn(overview)


def _show(overview: QueueOverview) -> None:
    from fluffle_broker.inspect.queues_table import build_table, hints, legend

    shown = screen()

    def write(line: str, style: str | None = None) -> None:
        # In a pipe, a sentence stays on one line, so that grep finds it.
        shown.print(line, style=style, soft_wrap=not shown.is_terminal)

    if overview.queues:
        shown.print(build_table(overview, shown.width))
    for line in legend(overview):
        write(line, "dim")
    for line in hints(overview):
        write(f"! {line}", "bold yellow")
    if not overview.created:
        others = f" (this broker has {', '.join(overview.others)})" if overview.others else ""
        write(
            f"no coordinator has created federation {overview.topology.federation} on this broker "
            f"yet; start the coordinator, or check --federation{others}"
        )
    elif overview.at_rest:
        at = f"--federation {overview.topology.federation}"
        write(f"nobody is connected; see the last run with 'fluffle explain {at}'")


def _warn(overview: QueueOverview) -> None:
    for note in _notes(overview):
        warn(note)


def _notes(overview: QueueOverview) -> Iterator[str]:
    if overview.alarms:
        yield (
            f"the broker has run out of {' and '.join(overview.alarms)}, and accepts no messages "
            "until there is room again"
        )
    if overview.note:
        yield overview.note


def _watch(once: Callable[[], QueueOverview], as_json: bool) -> None:
    """Show the queues repeatedly: redrawn on a terminal, one block after another elsewhere."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from fluffle_broker.inspect.queues_table import build_table, hints
    from fluffle_common.errors import BrokerError

    redraws = can_redraw(sys.stdout) and not as_json
    with Live(console=screen(), auto_refresh=False) if redraws else nullcontext() as live:
        while True:
            try:
                overview = once()
            except BrokerError as why:  # it may be restarting
                warn(str(why))
            else:
                if live is not None:
                    # The end is cut off if it does not fit on the screen, so hints come first.
                    lines = [*hints(overview), *_notes(overview)]
                    marked = [Text(f"! {printable(line)}", style="bold yellow") for line in lines]
                    live.update(
                        Group(*marked, build_table(overview, live.console.width)), refresh=True
                    )
                elif as_json:
                    echo_json(overview.as_dicts(), indent=None)
                else:
                    echo(time.strftime("%H:%M:%S"))
                    _show(overview)
                if live is None:
                    _warn(overview)
            time.sleep(_EVERY_S)
