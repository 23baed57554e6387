"""``fluffle tap``: the traffic of a federation as it passes, a line a message."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_broker.cli.options import figures_if_told, looking, where
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.app import management_option
from fluffle_common.cli.printing import echo, echo_sentences, visible_json

if TYPE_CHECKING:
    from fluffle_broker.inspect.archive import MessageArchive
    from fluffle_broker.inspect.decode import DecodedMessage
    from fluffle_broker.inspect.tap import Wanted
    from fluffle_common.protocol.topology import Topology

_MOST_TRANSFERS = 256


@click.command()
@click.option(
    "--kind", "kinds", multiple=True, metavar="KIND",
    help="Show only messages of this kind (update, evaluation, fit, hello, heartbeat, failure, "
    "part …); may be given several times.  [default: all but heartbeat; parts are counted, not "
    "listed]",
)  # fmt: skip
@click.option("--worker", metavar="W", help="Show only messages from or to this worker.")
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Save each message in this folder: its body as .msgpack, its properties as .json.",
)  # fmt: skip
@click.option(
    "-n", "--count", type=counts(), help="End after this many lines.  [default: at Ctrl-C]"
)
@looking("Print one JSON object a line.")
@management_option
def tap(**options: Any) -> None:
    """Follow the messages of a federation live, one a line.

    \b
      fluffle tap --federation letters
      fluffle tap --federation letters --kind update --worker w1 --save kept/

    "→ w1,w2" goes from the coordinator to these workers, "← w1" comes from w1.

    It reads copies, through a queue of its own that goes away with it, so nobody gets a message
    less or later; a reader too slow for the traffic loses the oldest copies, and only they.
    But the broker sends every copy: of a large model all its parts, once more in each round.
    '--kind update' leaves these out; the parts of updates come with --save only.

    It is bound only for queues that exist, looked at again every 10 seconds, since what reaches
    nobody but a tap would pass as delivered. So the first mail to a worker that has just come for
    the first time may be missed.
    """
    from fluffle_broker.inspect.tap import KINDS, Wanted
    from fluffle_common.cli.settings import check_worker, management_of
    from fluffle_common.errors import UsageError

    topology, address = where(options["federation"], options["url"])
    for kind in options["kinds"]:
        if kind not in KINDS:
            raise UsageError(f"there is no kind '{kind}'; there are {', '.join(KINDS)}")
    if options["worker"]:
        check_worker(options["worker"])
    kinds = frozenset(options["kinds"])
    wanted = Wanted(kinds, options["worker"], bool(options["save"]) or "part" in kinds)
    lines = Lines(wanted, options["as_json"], options["count"], _folder(options["save"]))
    workers = _known(topology, address, management_of(address, options["management"]))
    _run(topology, address, lines, workers)


def _folder(path: Path | None) -> MessageArchive | None:
    from fluffle_broker.inspect.archive import MessageArchive
    from fluffle_common.errors import UsageError

    try:
        return MessageArchive(path) if path else None
    except OSError as no:
        raise UsageError(f"{path} cannot be used as a folder for messages ({no})") from None


def _known(topology: Topology, address: str, base: str) -> set[str]:
    """Return the workers that have an inbox; the others say who they are within seconds."""
    inbox = topology.inbox("")
    names = figures_if_told(address, base, topology)
    return {name.removeprefix(inbox) for name in names if name.startswith(inbox)}


def _run(topology: Topology, address: str, lines: Lines, workers: set[str]) -> None:
    from fluffle_broker.inspect.tap import Tap
    from fluffle_common.cli.console import warn
    from fluffle_common.cli.runtime import Interrupted, run_until_signalled
    from fluffle_common.errors import BrokerError, LinkLost
    from fluffle_common.transport.base import QueueInUse
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport
    from fluffle_common.transport.reconnect import Backoff, reconnecting

    transport = AmqpTransport(address, "fluffle tap")

    def ready() -> None:
        warn(f"following federation {topology.federation} on {transport.address}")

    def no_broker(reason: str, pause_s: float) -> None:
        warn(f"no broker ({reason}); trying again in {pause_s:.1f} s")

    async def follow() -> None:
        async with contextlib.aclosing(reconnecting(transport, Backoff(), no_broker)) as opened:
            async for link in opened:
                tapping = Tap(link, topology, lines.wanted, workers, lines.take)
                run = asyncio.ensure_future(tapping.run(ready))
                end = asyncio.ensure_future(lines.enough.wait())
                try:
                    await asyncio.wait({run, end}, return_when=asyncio.FIRST_COMPLETED)
                    if lines.enough.is_set():
                        return
                    await run
                except LinkLost as gone:
                    warn(
                        f"lost the broker ({gone}); messages that pass until it is back are "
                        "not shown"
                    )
                finally:
                    run.cancel()
                    end.cancel()
                    await asyncio.gather(run, end, return_exceptions=True)

    try:
        run_until_signalled(follow())
    except QueueInUse as no:
        raise BrokerError(f"another process uses the tap's queue: {no}; try again") from None
    except Interrupted as signalled:
        sys.exit(signalled.exit_code)


class Lines:
    """Prints what is tapped.

    Args:
        wanted: what to show.
        as_json: an object a line instead.
        most: after so many lines it is ``enough``; None for no end.
        folder: where to keep the messages, if anywhere.
        clock: the time, in seconds since 1970.
        say: where a line goes; stdout unless told.
    """

    def __init__(
        self,
        wanted: Wanted,
        as_json: bool = False,
        most: int | None = None,
        folder: MessageArchive | None = None,
        *,
        clock: Callable[[], float] = time.time,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.wanted = wanted
        self.enough = asyncio.Event()
        self._as_json, self._left, self._folder = as_json, most, folder
        self._clock = clock
        self._say = say or (echo if as_json else echo_sentences)
        self._parts: dict[str, tuple[int, int]] = {}

    def take(self, reading: DecodedMessage) -> None:
        """Take in one message that is wanted.

        Raises:
            UsageError: where it cannot be kept.
        """
        if self.enough.is_set():
            return
        now = self._clock()
        if self._folder is not None:
            self._keep(self._folder, reading, now)
        if self._as_json and self.wanted.lists(reading):
            arrived = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
            said = {"time": arrived, **_directed(reading), **reading.as_dict(now)}
            self._line(visible_json(json.dumps(said)))
        elif self.wanted.lists(reading):
            self._line(_in_words(reading, now))
        elif not self._as_json:
            self._count_part(reading, now)

    def _keep(self, folder: MessageArchive, reading: DecodedMessage, now: float) -> None:
        from fluffle_common.errors import UsageError

        try:
            folder.keep(reading, now)
        except OSError as no:
            raise UsageError(
                f"a message cannot be saved ({no}); choose another folder with --save"
            ) from None

    def _line(self, text: str) -> None:
        self._say(text)
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self.enough.set()

    def _count_part(self, reading: DecodedMessage, now: float) -> None:
        """Tell of the parts of one transfer in one line, when all have passed."""
        from fluffle_broker.inspect.decode import part_of

        transfer = getattr(reading.message, "transfer", "")
        part = part_of(reading)
        count, size_bytes = self._parts.pop(transfer, (0, 0))
        count, size_bytes = count + 1, size_bytes + reading.size_bytes
        if part is not None and count == part[1]:
            self._line(_in_words(reading, now, f"all {count} parts", size_bytes))
            return
        self._parts[transfer] = (count, size_bytes)
        if len(self._parts) > _MOST_TRANSFERS:
            del self._parts[next(iter(self._parts))]


def _directed(reading: DecodedMessage) -> dict[str, Any]:
    from fluffle_broker.inspect.tap import is_work, whom

    return {"direction": "to" if is_work(reading) else "from", "workers": list(whom(reading))}


def _in_words(
    reading: DecodedMessage, now: float, told: str | None = None, size_bytes: int | None = None
) -> str:
    from fluffle_broker.inspect.formatting import facts, size
    from fluffle_broker.inspect.tap import is_work, whom

    arrow, who = "→" if is_work(reading) else "←", ",".join(whom(reading))
    if isinstance(many := reading.delivery.properties.headers.get("recipients"), int):
        who += f" and {many - 1} more"
    at = time.strftime("%H:%M:%S", time.localtime(now))
    words = told or ", ".join(facts(reading))
    bytes_ = size(reading.size_bytes if size_bytes is None else size_bytes)
    return f"{at}  {arrow} {who:<12} {reading.kind:<13} {words}  ({bytes_})"
