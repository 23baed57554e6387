"""``fluffle tap``: follow the messages of a federation live."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_broker.cli.options import available_figures, federation_and_broker, inspection_options
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.app import management_option, queue_type_option
from fluffle_common.cli.printing import echo, echo_sentences, visible_json

if TYPE_CHECKING:
    from fluffle_broker.inspect.archive import MessageArchive
    from fluffle_broker.inspect.decode import DecodedMessage
    from fluffle_broker.inspect.tap import Wanted
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.base import Link
    from fluffle_common.transport.rabbitmq.management import Management

_WHO_WIDTH, _WIDEST_WHO = 12, 32


@click.command()
@click.option(
    "--kind", "kinds", multiple=True, metavar="KIND",
    help="Kind of message to show (update, evaluation, fit, hello, heartbeat, failure, part "
    "…). For several kinds, repeat the option.  [default: all kinds except heartbeat and part]",
)  # fmt: skip
@click.option(
    "--worker", metavar="W", help="Show only messages from or to the worker with this ID."
)
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Folder to save the messages in. A message's body is saved as a .msgpack file, and "
    "its properties as a .json file.",
)  # fmt: skip
@click.option(
    "-n",
    "--count",
    type=counts(),
    help="Number of lines to print before the command ends.  [default: no limit]",
)
@inspection_options("Print one JSON object per line.")
@management_option
@queue_type_option
def tap(**options: Any) -> None:
    """Print a federation's messages live, one line each.

    \b
      fluffle tap --federation letters
      fluffle tap --federation letters --kind update --worker w1 --save kept/

    A line with "→ w1,w2" shows a message from the coordinator to the workers w1 and w2. A line with
    "← w1" shows a message from the worker w1.

    The command reads copies of the messages from its own temporary queue, so no message is lost or
    delayed for its receiver. If the command is too slow for the traffic, the queue drops the oldest
    copies. The command adds load to the broker, because the broker sends the model of each round
    once more. To exclude models, use '--kind update'. The parts of updates are copied only with
    --save or '--kind part'.

    The command does not copy a message that matches no other queue. Otherwise, the broker would
    treat the message as delivered, and would not move it to 'unrouted'. The command looks for new
    queues every 10 seconds, so it may miss the first messages to a new worker.
    """
    from fluffle_broker.inspect.archive import MessageArchive
    from fluffle_broker.inspect.tap import KINDS, Wanted
    from fluffle_common.arguments import nearest
    from fluffle_common.cli.settings import broker_url_finder, check_worker
    from fluffle_common.errors import UsageError

    topology, api = federation_and_broker(
        options["federation"], options["url"], options["management"]
    )
    topology = replace(topology, queue_type=options["queue_type"])
    for kind in options["kinds"]:
        if kind not in KINDS:
            raise UsageError(f"unknown --kind {kind}; {nearest(kind, KINDS)}")
    if options["worker"]:
        check_worker(options["worker"])
    kinds = frozenset(options["kinds"])
    wanted = Wanted(kinds, options["worker"], bool(options["save"]) or "part" in kinds)
    archive = MessageArchive(options["save"]) if options["save"] else None
    printer = TapPrinter(wanted, options["as_json"], options["count"], archive)
    workers = _known_workers(topology, api)
    _run(topology, broker_url_finder(options["url"]), printer, workers)


def _known_workers(topology: Topology, api: Management) -> set[str]:
    """Return the workers that have an inbox; others are noticed by their heartbeats."""
    inbox = topology.inbox("")
    names = available_figures(api, topology)
    return {name.removeprefix(inbox) for name in names if name.startswith(inbox)}


def _run(
    topology: Topology, find_url: Callable[[], str], printer: TapPrinter, workers: set[str]
) -> None:
    from fluffle_broker.inspect.tap import Tap
    from fluffle_common.cli.console import warn
    from fluffle_common.cli.runtime import run_until_signalled
    from fluffle_common.errors import LinkLost
    from fluffle_common.transport.open_once import explain_refusals
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport
    from fluffle_common.transport.reconnect import Backoff, reconnecting

    transport = AmqpTransport(find_url, "fluffle tap")

    def ready() -> None:
        warn(f"following federation {topology.federation} on {transport.address}")

    warned = False

    async def warn_if_missing(link: Link) -> None:
        nonlocal warned
        if not warned and not await link.exists(topology.work):
            warned, name = True, topology.federation
            warn(
                f"no coordinator has created federation {name} on this broker yet; waiting. To "
                f"list the broker's federations, run 'fluffle queues --federation {name}'"
            )

    async def follow() -> None:
        links = reconnecting(
            transport, Backoff(), lambda reason: warn(f"no broker ({reason}); trying again")
        )
        async with contextlib.aclosing(links):
            async for link in links:
                try:
                    await warn_if_missing(link)
                    await Tap(link, topology, printer.wanted, workers, printer.show).run(ready)
                except LinkLost as gone:
                    warn(
                        f"lost the connection to the broker ({gone}); messages are not shown until "
                        "the connection is back"
                    )

    with explain_refusals(), contextlib.suppress(Enough):
        run_until_signalled(follow())


class Enough(Exception):
    """All the lines that were asked for are printed."""


class TapPrinter:
    """Prints and saves the messages of a tap, at most ``most`` lines."""

    def __init__(
        self,
        wanted: Wanted,
        as_json: bool = False,
        most: int | None = None,
        archive: MessageArchive | None = None,
        *,
        clock: Callable[[], float] = time.time,
        print_line: Callable[[str], None] | None = None,
    ) -> None:
        self.wanted = wanted
        self._as_json, self._left, self._archive = as_json, most, archive
        self._clock = clock
        self._print_line = print_line or (echo if as_json else echo_sentences)
        self._who_width = _WHO_WIDTH  # of the widest line so far, so that later lines align

    def show(self, decoded: DecodedMessage) -> None:
        """Print a message, and save it or raise ``UsageError``; raise ``Enough`` after the last."""
        from fluffle_broker.inspect.tap import is_work, workers_of

        now = self._clock()
        if self._archive is not None:
            self._archive.save(decoded, now)
        if not self.wanted.lists(decoded):
            return
        if self._as_json:
            arrived = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
            direction, workers = "to" if is_work(decoded) else "from", workers_of(decoded)
            fields = {"time": arrived, "direction": direction, "workers": list(workers)}
            text = visible_json(json.dumps(fields | decoded.as_dict(now)))
        else:
            text = self._in_words(decoded, now)
        self._print_line(text)
        if self._left is not None:
            self._left -= 1
            if not self._left:
                raise Enough

    def _in_words(self, decoded: DecodedMessage, now: float) -> str:
        from fluffle_broker.inspect.formatting import facts, size
        from fluffle_broker.inspect.tap import is_work, workers_of

        arrow, who = "→" if is_work(decoded) else "←", ",".join(workers_of(decoded))
        if isinstance(many := decoded.delivery.properties.headers.get("recipients"), int):
            who += f" and {many - 1} more"
        self._who_width = max(self._who_width, min(len(who), _WIDEST_WHO))
        at = time.strftime("%H:%M:%S", time.localtime(now))
        text = f"{', '.join(facts(decoded))}  ({size(decoded.size_bytes)})"
        return f"{at}  {arrow} {who:<{self._who_width}} {decoded.kind:<13} {text}"
